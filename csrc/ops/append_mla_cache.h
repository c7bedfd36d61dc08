// Writes latent and rope part of new tokens into the paged cache.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace kimi {

template <class Activation>
struct AppendMlaCacheParams {
  const Activation* latent;  // [T, C]
  int64_t latent_stride;
  const Activation* k_pe;  // [T, R]
  int64_t k_pe_stride;
  void* cache;  // [pages, page_size, C + R], bf16 or float32
  DType cache_dtype;
  const int64_t* slots;  // [T]: page * page_size + offset
  int T, C, R;
  int64_t num_slots;  // pages * page_size
};

// The row as kv_a_proj_with_mqa gives it: norm of the latent, rotation of the rope part, then append_mla_cache.
template <class Activation>
struct FusedAppendMlaCacheParams {
  const Activation* kv;  // [T, C + R]
  int64_t kv_stride;
  const bf16* weight;        // [C] of the latent's norm
  const float* cos;          // [P, R / 2]
  const float* sin;          // [P, R / 2]
  const int32_t* positions;  // [T], each in [0, P)
  void* cache;               // [pages, page_size, C + R], bf16 or float32
  DType cache_dtype;
  const int64_t* slots;  // [T]: page * page_size + offset
  int T, C, R, P;
  int64_t num_slots;  // pages * page_size
  float eps;
};

namespace cpu {
void append_mla_cache(const AppendMlaCacheParams<float>& p);
void fused_append_mla_cache(const FusedAppendMlaCacheParams<float>& p);
}  // namespace cpu
namespace cuda {
void append_mla_cache(const AppendMlaCacheParams<bf16>& p, Stream stream);
void fused_append_mla_cache(const FusedAppendMlaCacheParams<bf16>& p, Stream stream);
}  // namespace cuda

}  // namespace kimi
