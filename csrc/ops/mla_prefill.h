// Naive MLA attention of many new tokens over expanded keys and values, causal, sequences of different lengths.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace kimi {

template <class Activation>
struct MlaPrefillParams {
  const Activation* q;  // [T, N, Dn + R], rope part last
  int64_t q_stride_t, q_stride_n;
  const Activation* kv;  // [S, N, Dn + Dv]: k_nope, then v
  int64_t kv_stride_s, kv_stride_n;
  const Activation* k_pe;  // [S, R], shared by the heads
  int64_t k_pe_stride;
  const int32_t* cu_seqlens_q;    // [B + 1]
  const int32_t* cu_seqlens_k;    // [B + 1]
  const int32_t* causal_offsets;  // [B]: key j is visible to query i of its sequence iff j <= i + offset
  Activation* out;                // [T, N, Dv]
  float* lse;                     // [T, N], log of the sum of exp(score)
  float* max_logits;              // [T, N] or null, the largest score; NaN if one is NaN or +inf
  int B, T, S, N, Dn, R, Dv;
  float scale;
  bool continue_state;  // out, lse and max_logits hold the result over other keys of the same queries
};

namespace cpu {
constexpr int kMaxMlaPrefillWidth = 2048;  // of Dn + R + Dv
void mla_prefill(const MlaPrefillParams<float>& p);
}  // namespace cpu
namespace cuda {
void mla_prefill(const MlaPrefillParams<bf16>& p, Stream stream);
}  // namespace cuda

}  // namespace kimi
