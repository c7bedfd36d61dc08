// Sort (token, slot) rows by expert, and the weighted way back.
#pragma once
#include "core/dtype.h"

namespace kimi {

struct MoePermuteParams {
  const float* x;  // [T, H]
  int64_t x_stride;
  const int32_t* topk_ids;  // [T, K], in [-1, E); -1 is skipped
  float* permuted;          // [T * K, H]; rows from offsets[E] on are zero
  int32_t* offsets;         // [E + 1]: rows of expert e are offsets[e] .. offsets[e + 1]
  int32_t* inverse;         // [T, K]: row of (token, slot), -1 if skipped
  int T, H, K, E;
};

// out[t] = sum_k topk_weights[t, k] * y[inverse[t, k]]
struct MoeUnpermuteParams {
  const float* y;             // [M, H]
  const float* topk_weights;  // [T, K]
  const int32_t* inverse;     // [T, K], in [-1, M)
  float* out;                 // [T, H]
  int64_t out_stride;
  int T, H, K;
};

namespace cpu {
void moe_permute(const MoePermuteParams& p);
void moe_unpermute(const MoeUnpermuteParams& p);
}  // namespace cpu

}  // namespace kimi
