// Router output to weighted sum of experts: out[t] = sum_k w_k * down_e( silu(gate_e x[t]) * up_e x[t] ), e = ids[t,
// k], or with accumulate out[t] + that sum.
#pragma once
#include <cstddef>

#include "core/stream.h"
#include "ops/expert_weights.h"

namespace kimi {

template <class Activation>
struct FusedMoeParams {
  const Activation* x;  // [T, H]
  int64_t x_stride;
  const float* topk_weights;  // [T, K]
  const int32_t* topk_ids;    // [T, K], in [-1, E); -1 is skipped
  ExpertWeights gate, up;     // [E, I, H]
  ExpertWeights down;         // [E, H, I]
  Activation* out;            // [T, H]
  int64_t out_stride;
  float* workspace;  // fused_moe_workspace(p) floats
  int T, H, I, K, E;
  int digits;  // CPU, INT4 weights: inputs as integers of so many signed bytes, 1 or 2 (see cpu/kernels.h); 0: as
               // floats
  bool accumulate;
};

namespace cpu {
size_t fused_moe_workspace(const FusedMoeParams<float>& p);
void fused_moe(const FusedMoeParams<float>& p);
}  // namespace cpu
namespace cuda {
size_t fused_moe_workspace(const FusedMoeParams<bf16>& p);
void fused_moe(const FusedMoeParams<bf16>& p, Stream stream);
}  // namespace cuda

}  // namespace kimi
