// Writes latent and rope part of new tokens into the paged cache.
#pragma once
#include "core/dtype.h"

namespace kimi {

struct AppendMlaCacheParams {
  const float* latent;  // [T, C]
  int64_t latent_stride;
  const float* k_pe;  // [T, R]
  int64_t k_pe_stride;
  void* cache;  // [pages, page_size, C + R], bf16 or float32
  DType cache_dtype;
  const int64_t* slots;  // [T]: page * page_size + offset
  int T, C, R;
};

namespace cpu {
void append_mla_cache(const AppendMlaCacheParams& p);
}

}  // namespace kimi
