#include "ops/silu_and_mul.h"

#include "cuda/device.cuh"

namespace kimi::cuda {
namespace {

constexpr int kThreads = 256;

// expf and the division are the accurate ones: exp's fast form is off by 100 ulp at -80, and the fast quotient is 0
// for divisors above 2^126. Memory leaves time for both.
PTX_FN float silu_and_mul(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

// `parts` blocks a row, a thread one step: eight outputs where rows allow 16-byte accesses, otherwise one.
template <int Step>
__global__ void __launch_bounds__(kThreads)
    silu_and_mul_kernel(const bf16* x, int64_t x_stride, bf16* out, int64_t out_stride, int I, int parts) {
  const int64_t row = blockIdx.x / parts;
  const int i = (blockIdx.x % parts * kThreads + threadIdx.x) * Step;
  if (i >= I) return;
  const bf16* gate = x + row * x_stride + i;
  const bf16* up = gate + I;
  out += row * out_stride + i;
  if constexpr (Step == 8) {
    float g[8], u[8];
    unpack8(*reinterpret_cast<const uint4*>(gate), g);
    unpack8(*reinterpret_cast<const uint4*>(up), u);
#pragma unroll
    for (int j = 0; j < 8; ++j) g[j] = silu_and_mul(g[j], u[j]);
    *reinterpret_cast<uint4*>(out) = pack8(g);
  } else {
    *out = to_bf16(silu_and_mul(to_float(*gate), to_float(*up)));
  }
}

}  // namespace

void silu_and_mul(const SiluAndMulParams<bf16>& p, Stream stream) {
  const bool vector =
      p.I % 8 == 0 && p.x_stride % 8 == 0 && p.out_stride % 8 == 0 && aligned16(p.x) && aligned16(p.out);
  const int parts = ceil_div(p.I, kThreads * (vector ? 8 : 1));
  gpu::launch(vector ? silu_and_mul_kernel<8> : silu_and_mul_kernel<1>, dim3(unsigned(p.T) * unsigned(parts)),
              dim3(kThreads), 0, stream, p.x, p.x_stride, p.out, p.out_stride, p.I, parts);
}

}  // namespace kimi::cuda
