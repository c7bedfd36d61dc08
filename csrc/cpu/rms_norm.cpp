#include "ops/rms_norm.h"

#include <cmath>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

constexpr int64_t kRows = 8;  // rows a thread takes at a time

void normalise(const Kernels& k, const float* x, const bf16* weight, float* out, int H, float eps) {
  const float mean = k.sum_squares(x, H) / float(H);
  k.scale_by_weight(x, weight, 1.0f / std::sqrt(mean + eps), out, H);
}

void normalise(const Kernels& k, const float* x, const float* weight, float* out, int H, float eps) {
  const float mean = k.sum_squares(x, H) / float(H);
  k.scale_by_float_weight(x, weight, 1.0f / std::sqrt(mean + eps), out, H);
}

template <class Weight>
void normalise_rows(const RmsNormParams<float, Weight>& p) {
  const Kernels& k = kernels();
  parallel_for(p.T, kRows, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      normalise(k, p.x + t * p.x_stride, p.weight, p.out + t * p.out_stride, p.H, p.eps);
  });
}

}  // namespace

void rms_norm(const RmsNormParams<float>& p) { normalise_rows(p); }
void rms_norm(const RmsNormParams<float, float>& p) { normalise_rows(p); }

void fused_add_rms_norm(const FusedAddRmsNormParams<float>& p) {
  const Kernels& k = kernels();
  parallel_for(p.T, kRows, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      float* residual = p.residual + t * p.residual_stride;
      k.add_scaled(residual, 1.0f, p.x + t * p.x_stride, p.H);
      normalise(k, residual, p.weight, p.out + t * p.out_stride, p.H, p.eps);
    }
  });
}

}  // namespace kimi::cpu
