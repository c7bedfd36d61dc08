// out = a @ b in float32, of matrices or of batches of them.
#pragma once
#include <cstdint>

namespace kimi {

// Element (i, j) lies at data[i * stride + j], or at data[j * stride + i] when transposed.
struct FloatMatrix {
  const float* data;
  int64_t stride;
  bool transposed;

  const float* at(int64_t i, int64_t j) const { return data + (transposed ? j * stride + i : i * stride + j); }
  FloatMatrix from(int64_t i, int64_t j) const { return {at(i, j), stride, transposed}; }
};

struct MatmulParams {
  FloatMatrix a, b;  // the first of B: [M, K] and [K, N]
  int64_t a_stride_b, b_stride_b;
  float* out;  // [B, M, N]
  int64_t out_stride_b, out_stride;
  int B, M, K, N;
  bool symmetric;  // M = N, and so are all of out: what lies above the diagonal is copied from below
};

namespace cpu {
void matmul(const MatmulParams& p);
}

}  // namespace kimi
