// The gradients of mla_prefill: with p = exp(score - lse) and dp = dout . v, d score = p * (dp - dout . out), from
// which those of q and of the keys follow; d v = p dout.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kimi {

struct MlaPrefillBackwardParams {
  const float* q;  // [T, N, Dn + R], rope part last
  int64_t q_stride_t, q_stride_n;
  const float* kv;  // [S, N, Dn + Dv]: k_nope, then v
  int64_t kv_stride_s, kv_stride_n;
  const float* k_pe;  // [S, R], shared by the heads
  int64_t k_pe_stride;
  const int32_t* cu_seqlens_q;    // [B + 1]
  const int32_t* cu_seqlens_k;    // [B + 1]
  const int32_t* causal_offsets;  // [B]: key j is visible to query i of its sequence iff j <= i + offset
  const float* out;               // [T, N, Dv], as mla_prefill gave it
  const float* lse;               // [T, N], as mla_prefill gave it
  const float* dout;              // [T, N, Dv]
  float* dq;                      // [T, N, Dn + R]
  float* dkv;                     // [S, N, Dn + Dv]
  float* dk_pe;                   // [S, R]
  float* workspace;               // mla_prefill_backward_workspace(p) floats
  int B, T, S, N, Dn, R, Dv;
  float scale;
};

namespace cpu {
size_t mla_prefill_backward_workspace(const MlaPrefillBackwardParams& p);
void mla_prefill_backward(const MlaPrefillBackwardParams& p);
}  // namespace cpu

}  // namespace kimi
