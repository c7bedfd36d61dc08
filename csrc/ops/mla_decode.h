// Absorbed MLA attention: one query token per sequence against the paged latent cache.
#pragma once
#include <cstddef>

#include "core/dtype.h"

namespace kimi {

struct MlaDecodeParams {
  const float* q;     // [B, N, C + R], projected into latent space; rope part last
  const void* cache;  // [pages, page_size, C + R], bf16 or float32
  DType cache_dtype;
  const int32_t* page_table;  // [B, max_pages]
  const int32_t* seq_lens;    // [B]
  float* out;                 // [B, N, C]
  float* lse;                 // [B, N], log of the sum of exp(score)
  float* workspace;           // mla_decode_workspace(p) floats
  int B, N, C, R, page_size, max_pages;
  int max_seq_len;  // largest of seq_lens
  float scale;
};

size_t mla_decode_workspace(const MlaDecodeParams& p);

namespace cpu {
void mla_decode(const MlaDecodeParams& p);
}

}  // namespace kimi
