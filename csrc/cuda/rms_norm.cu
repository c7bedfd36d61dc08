#include "ops/rms_norm.h"

#include "cuda/device.cuh"

namespace kimi::cuda {
namespace {

constexpr int kThreads = 256;

// One block a row, which it reads once from memory and once more from the cache. With a residual, x is added to it
// first. Vector: rows and weight allow 16-byte loads.
template <bool Residual, bool Vector>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const bf16* x, int64_t x_stride, float* residual, int64_t residual_stride, const bf16* weight,
                    bf16* out, int64_t out_stride, int H, float eps) {
  GPU_SHARED(part, float[kThreads / kWarp]);
  x += blockIdx.x * x_stride, out += blockIdx.x * out_stride;
  if (Residual) residual += blockIdx.x * residual_stride;
  constexpr int kStep = Vector ? 8 : 1;

  const auto load = [&](int i, float (&v)[kStep]) {
    if constexpr (Vector)
      unpack8(*reinterpret_cast<const uint4*>(x + i), v);
    else
      v[0] = to_float(x[i]);
  };
  float sum = 0;
  for (int i = threadIdx.x * kStep; i < H; i += kThreads * kStep) {
    float v[kStep];
    load(i, v);
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      if (Residual) residual[i + j] = v[j] += residual[i + j];
      sum += v[j] * v[j];
    }
  }
  sum = block_reduce<kThreads>(sum, 0.0f, part, Add());
  const float scale = 1.0f / sqrtf(sum / float(H) + eps);
  for (int i = threadIdx.x * kStep; i < H; i += kThreads * kStep) {
    float v[kStep], w[kStep];
    if constexpr (Residual) {
      for (int j = 0; j < kStep; ++j) v[j] = residual[i + j];
    } else {
      load(i, v);
    }
    if constexpr (Vector) {
      unpack8(*reinterpret_cast<const uint4*>(weight + i), w);
      for (int j = 0; j < kStep; ++j) v[j] *= scale * w[j];
      *reinterpret_cast<uint4*>(out + i) = pack8(v);
    } else {
      out[i] = to_bf16(v[0] * scale * to_float(weight[i]));
    }
  }
}

}  // namespace

void rms_norm(const RmsNormParams<bf16>& p, Stream stream) {
  const bool vector = p.H % 8 == 0 && p.x_stride % 8 == 0 && p.out_stride % 8 == 0 && aligned16(p.x) &&
                      aligned16(p.weight) && aligned16(p.out);
  gpu::launch(vector ? rms_norm_kernel<false, true> : rms_norm_kernel<false, false>, dim3(p.T), dim3(kThreads), 0,
              stream, p.x, p.x_stride, nullptr, int64_t(0), p.weight, p.out, p.out_stride, p.H, p.eps);
}

void fused_add_rms_norm(const FusedAddRmsNormParams<bf16>& p, Stream stream) {
  const bool vector = p.H % 8 == 0 && p.x_stride % 8 == 0 && p.residual_stride % 8 == 0 && p.out_stride % 8 == 0 &&
                      aligned16(p.x) && aligned16(p.residual) && aligned16(p.weight) && aligned16(p.out);
  gpu::launch(vector ? rms_norm_kernel<true, true> : rms_norm_kernel<true, false>, dim3(p.T), dim3(kThreads), 0, stream,
              p.x, p.x_stride, p.residual, p.residual_stride, p.weight, p.out, p.out_stride, p.H, p.eps);
}

}  // namespace kimi::cuda
