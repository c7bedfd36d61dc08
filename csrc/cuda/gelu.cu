#include "ops/gelu.h"

#include "cuda/device.cuh"

namespace kimi::cuda {
namespace {

constexpr int kThreads = 256;

// Both keep relative accuracy where the result is small. Functions and division are the accurate ones: memory leaves
// time for them. 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2 u)).
template <bool Tanh>
PTX_FN float gelu(float v) {
  if constexpr (Tanh)
    return v / (1.0f + expf(-1.595769122f * v * (1.0f + 0.044715f * v * v)));
  else
    return 0.5f * v * erfcf(-0.707106781f * v);
}

// `parts` blocks a row, a thread one step: eight outputs where rows allow 16-byte accesses, otherwise one.
template <bool Tanh, int Step>
__global__ void __launch_bounds__(kThreads) gelu_kernel(GeluParams<bf16> p, int parts) {
  const int64_t row = blockIdx.x / parts;
  const int i = (blockIdx.x % parts * kThreads + threadIdx.x) * Step;
  if (i >= p.I) return;
  const bf16* x = p.x + row * p.x_stride + i;
  bf16* out = p.out + row * p.out_stride + i;
  if constexpr (Step == 8) {
    float v[8], bias[8] = {};
    unpack8(*reinterpret_cast<const uint4*>(x), v);
    if (p.bias) unpack8(*reinterpret_cast<const uint4*>(p.bias + i), bias);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = gelu<Tanh>(v[j] + bias[j]);
    *reinterpret_cast<uint4*>(out) = pack8(v);
  } else {
    *out = to_bf16(gelu<Tanh>(to_float(*x) + (p.bias ? to_float(p.bias[i]) : 0.0f)));
  }
}

}  // namespace

void gelu(const GeluParams<bf16>& p, Stream stream) {
  const bool vector = p.I % 8 == 0 && p.x_stride % 8 == 0 && p.out_stride % 8 == 0 && aligned16(p.x) &&
                      aligned16(p.bias) && aligned16(p.out);
  const int parts = ceil_div(p.I, kThreads * (vector ? 8 : 1));
  auto* kernel = p.tanh ? (vector ? gelu_kernel<true, 8> : gelu_kernel<true, 1>)
                        : (vector ? gelu_kernel<false, 8> : gelu_kernel<false, 1>);
  gpu::launch(kernel, dim3(unsigned(p.T) * unsigned(parts)), dim3(kThreads), 0, stream, p, parts);
}

}  // namespace kimi::cuda
