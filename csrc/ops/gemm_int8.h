// Weights rounded to int8: out[t, n] = weight[n] x[t, n] with x rounded to int16 per 32 inputs, and the rounding of the
// weights.
#pragma once
#include <cstddef>

#include "core/dtype.h"

namespace kimi {

constexpr int kInt8Group = 32;  // inputs that share a scale

struct GemmInt8Params {
  const float* x;  // [T, N, in]
  int64_t x_stride_t, x_stride_n;
  const int8_t* weight;      // [N, out, in]
  const bf16* weight_scale;  // [N, out, in / 32]
  float* out;                // [T, N, out]
  int64_t out_stride_t, out_stride_n;
  float* workspace;  // gemm_int8_workspace floats
  int T, N, n_in, n_out;
};

// scale = bf16(absmax / 127), q = clamp(rint(w / scale), -127, 127); 0 where the scale is 0. A group with a non-finite
// value gets a NaN scale and q = 0, so that it stays visible.
struct QuantizeInt8Params {
  const bf16* weight;  // [out, in]
  int8_t* quantized;   // [out, in]
  bf16* weight_scale;  // [out, in / 32]
  int n_out, n_in;
};

namespace cpu {
size_t gemm_int8_workspace(const GemmInt8Params& p);
void gemm_int8(const GemmInt8Params& p);
void quantize_int8(const QuantizeInt8Params& p);
}  // namespace cpu

}  // namespace kimi
