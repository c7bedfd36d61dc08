// Root mean square normalisation: out = x * rsqrt(mean(x^2) + eps) * weight.
#pragma once
#include "core/dtype.h"

namespace kimi {

struct RmsNormParams {
  const float* x;      // [T, H]
  int64_t x_stride;    // between rows
  const bf16* weight;  // [H]
  float* out;          // [T, H]
  int64_t out_stride;
  int T, H;
  float eps;
};

// residual += x, then out = rms_norm(residual).
struct FusedAddRmsNormParams {
  const float* x;  // [T, H]
  int64_t x_stride;
  float* residual;  // [T, H], updated in place
  int64_t residual_stride;
  const bf16* weight;  // [H]
  float* out;          // [T, H]
  int64_t out_stride;
  int T, H;
  float eps;
};

namespace cpu {
void rms_norm(const RmsNormParams& p);
void fused_add_rms_norm(const FusedAddRmsNormParams& p);
}  // namespace cpu

}  // namespace kimi
