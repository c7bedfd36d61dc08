// Router output to weighted sum of experts: out[t] = sum_k w_k * down_e( silu(gate_e x[t]) * up_e x[t] ), e = ids[t,
// k].
#pragma once
#include <cstddef>

#include "ops/expert_weights.h"

namespace kimi {

struct FusedMoeParams {
  const float* x;  // [T, H]
  int64_t x_stride;
  const float* topk_weights;  // [T, K]
  const int32_t* topk_ids;    // [T, K], in [-1, E); -1 is skipped
  ExpertWeights gate, up;     // [E, I, H]
  ExpertWeights down;         // [E, H, I]
  float* out;                 // [T, H]
  int64_t out_stride;
  float* workspace;  // fused_moe_workspace(p) floats
  int T, H, I, K, E;
};

size_t fused_moe_workspace(const FusedMoeParams& p);

namespace cpu {
void fused_moe(const FusedMoeParams& p);
}

}  // namespace kimi
