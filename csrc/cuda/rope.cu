#include "cuda/rope.cuh"

#include <algorithm>

#include "ops/rope.h"

namespace kimi::cuda {
namespace {

constexpr int kThreads = 256;

// Block (t, j) rotates kStep elements a thread of the N heads of token t.
template <int kStep>
__global__ void __launch_bounds__(kThreads)
    rope_kernel(const bf16* x, int64_t x_stride_t, int64_t x_stride_n, const float* cos, const float* sin,
                const int32_t* positions, bf16* out, int64_t out_stride_t, int64_t out_stride_n, int N, int R, int P) {
  const int64_t t = blockIdx.x;
  const int part = blockIdx.y * blockDim.x + threadIdx.x, parts = R / kStep;  // of a head
  const int n = part / parts, r = part % parts * kStep;
  if (n >= N) return;
  float v[kStep];
  load(x + t * x_stride_t + n * x_stride_n + r, v);
  rotate_at(v, cos, sin, positions[t], P, R, r / 2);
  store(out + t * out_stride_t + n * out_stride_n + r, v);
}

}  // namespace

void rope(const RopeParams<bf16>& p, Stream stream) {
  const bool vector = p.R % 8 == 0 && p.x_stride_t % 8 == 0 && p.x_stride_n % 8 == 0 && p.out_stride_t % 8 == 0 &&
                      p.out_stride_n % 8 == 0 && aligned16(p.x) && aligned16(p.out) && aligned16(p.cos) &&
                      aligned16(p.sin);
  const int64_t parts = int64_t(p.N) * p.R / (vector ? 8 : 2);  // of a token
  const int threads = std::min(kThreads, ceil_div(parts, kWarp) * kWarp);
  if (parts == 0) return;
  gpu::launch(vector ? rope_kernel<8> : rope_kernel<2>, dim3(p.T, ceil_div(parts, threads)), dim3(threads), 0, stream,
              p.x, p.x_stride_t, p.x_stride_n, p.cos, p.sin, p.positions, p.out, p.out_stride_t, p.out_stride_n, p.N,
              p.R, p.P);
}

}  // namespace kimi::cuda
