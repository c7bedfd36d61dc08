// Root mean square normalisation: out = x * rsqrt(mean(x^2) + eps) * weight.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace kimi {

template <class Activation, class Weight = bf16>
struct RmsNormParams {
  const Activation* x;   // [T, H]
  int64_t x_stride;      // between rows
  const Weight* weight;  // [H]
  Activation* out;       // [T, H]
  int64_t out_stride;
  int T, H;
  float eps;
};

// residual += x, then out = rms_norm(residual).
template <class Activation>
struct FusedAddRmsNormParams {
  const Activation* x;  // [T, H]
  int64_t x_stride;
  float* residual;  // [T, H], updated in place
  int64_t residual_stride;
  const bf16* weight;  // [H]
  Activation* out;     // [T, H]
  int64_t out_stride;
  int T, H;
  float eps;
};

namespace cpu {
void rms_norm(const RmsNormParams<float>& p);
void rms_norm(const RmsNormParams<float, float>& p);
void fused_add_rms_norm(const FusedAddRmsNormParams<float>& p);
}  // namespace cpu
namespace cuda {
void rms_norm(const RmsNormParams<bf16>& p, Stream stream);
void fused_add_rms_norm(const FusedAddRmsNormParams<bf16>& p, Stream stream);
}  // namespace cuda

}  // namespace kimi
