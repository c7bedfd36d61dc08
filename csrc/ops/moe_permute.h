// Sort (token, slot) rows by expert, and the weighted way back.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace kimi {

template <class Activation>
struct MoePermuteParams {
  const Activation* x;  // [T, H]
  int64_t x_stride;
  const int32_t* topk_ids;  // [T, K], in [-1, E); -1 is skipped
  Activation* permuted;     // [T * K, H]; rows from offsets[E] on are zero
  int32_t* offsets;         // [E + 1]: rows of expert e are offsets[e] .. offsets[e + 1]
  int32_t* inverse;         // [T, K]: row of (token, slot), -1 if skipped
  int T, H, K, E;
};

// out[t] = sum_k topk_weights[t, k] * y[inverse[t, k]]
template <class Activation>
struct MoeUnpermuteParams {
  const Activation* y;        // [M, H]
  const float* topk_weights;  // [T, K]
  const int32_t* inverse;     // [T, K], in [-1, M)
  Activation* out;            // [T, H]
  int64_t out_stride;
  int M, T, H, K;
};

namespace cpu {
void moe_permute(const MoePermuteParams<float>& p);
void moe_unpermute(const MoeUnpermuteParams<float>& p);
}  // namespace cpu
namespace cuda {
void moe_permute(const MoePermuteParams<bf16>& p, Stream stream);
void moe_unpermute(const MoeUnpermuteParams<bf16>& p, Stream stream);
}  // namespace cuda

}  // namespace kimi
