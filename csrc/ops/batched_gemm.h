// One matrix per head: out[t, n] = weight[n] x[t, n], or weight[n]^T x[t, n]. MLA's absorbed projections.
#pragma once
#include "core/dtype.h"

namespace kimi {

struct BatchedGemmParams {
  const float* x;  // [T, N, in]
  int64_t x_stride_t, x_stride_n;
  const bf16* weight;       // [N, out, in], or [N, in, out] when transposed
  int64_t weight_stride_n;  // between matrices; rows of one matrix are contiguous
  float* out;               // [T, N, out]
  int64_t out_stride_t, out_stride_n;
  int T, N, n_in, n_out;
  bool transpose_weight;
};

namespace cpu {
void batched_gemm(const BatchedGemmParams& p);
}

}  // namespace kimi
