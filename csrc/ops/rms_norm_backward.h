// Gradients of rms_norm with a float32 weight: with r = rsqrt(mean(x^2) + eps) and d = dout * weight,
// dx = r d - r^3 mean(d x) x and dweight = the sum over rows of r dout x.
#pragma once
#include <cstdint>

namespace kimi {

constexpr int kBackwardRows = 64;  // whose share of dweight is summed by one thread

struct RmsNormBackwardParams {
  const float* x;  // [T, H]
  int64_t x_stride;
  const float* weight;  // [H]
  const float* dout;    // [T, H]
  int64_t dout_stride;
  float* dx;         // [T, H]
  float* dweight;    // [H]
  float* workspace;  // [T / kBackwardRows rounded up, H]
  int T, H;
  float eps;
};

namespace cpu {
void rms_norm_backward(const RmsNormBackwardParams& p);
}

}  // namespace kimi
