// out = x @ weight^T with bf16 weights. A single row takes the matrix-vector path.
#pragma once
#include "core/dtype.h"

namespace kimi {

struct GemmParams {
  const float* x;  // [T, in]
  int64_t x_stride;
  const bf16* weight;  // [out, in]
  float* out;          // [T, out]
  int64_t out_stride;
  int T, n_in, n_out;
};

namespace cpu {
void gemm(const GemmParams& p);
}

}  // namespace kimi
