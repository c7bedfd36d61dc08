#include "ops/layer_norm.h"

#include "cuda/device.cuh"

namespace kimi::cuda {
namespace {

using Params = LayerNormParams<bf16>;

constexpr int kRowsPerBlock = 4, kChunks = 6, kChunk = kWarp * 8;  // of rows that a warp has: up to 1536 wide
constexpr int kBlock = 256;                                        // threads any other row has

// A warp a row, which stays in registers: the mean is known before the squares are summed, and x is read once.
__global__ void __launch_bounds__(kRowsPerBlock* kWarp) layer_norm_kernel(Params p) {
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (row >= p.T) return;  // whole warps
  const int first = threadIdx.x % kWarp * 8;
  const bf16* x = p.x + row * p.x_stride;
  bf16* out = p.out + row * p.out_stride;

  uint4 packed[kChunks] = {};
  float v[kChunks][8], sum = 0, squares = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int i = first + c * kChunk;
    if (i < p.H) packed[c] = *reinterpret_cast<const uint4*>(x + i);
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    unpack8(packed[c], v[c]);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += v[c][j];
  }
  const float mean = warp_reduce(sum, Add()) / float(p.H);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (first + c * kChunk >= p.H) break;
#pragma unroll
    for (int j = 0; j < 8; ++j) v[c][j] -= mean, squares += v[c][j] * v[c][j];
  }
  const float scale = 1.0f / sqrtf(warp_reduce(squares, Add()) / float(p.H) + p.eps);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int i = first + c * kChunk;
    if (i >= p.H) break;
    float weight[8], bias[8];
    unpack8(*reinterpret_cast<const uint4*>(p.weight + i), weight);
    unpack8(*reinterpret_cast<const uint4*>(p.bias + i), bias);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[c][j] = v[c][j] * scale * weight[j] + bias[j];
    *reinterpret_cast<uint4*>(out + i) = pack8(v[c]);
  }
}

// Any width, stride and alignment: a block a row, element by element, read again for each pass.
__global__ void __launch_bounds__(kBlock) layer_norm_any_kernel(Params p) {
  GPU_SHARED(part, float[kBlock / kWarp]);
  const bf16* x = p.x + blockIdx.x * p.x_stride;
  bf16* out = p.out + blockIdx.x * p.out_stride;
  float sum = 0, squares = 0;
  for (int i = threadIdx.x; i < p.H; i += kBlock) sum += to_float(x[i]);
  const float mean = block_reduce<kBlock>(sum, 0.0f, part, Add()) / float(p.H);
  for (int i = threadIdx.x; i < p.H; i += kBlock) {
    const float v = to_float(x[i]) - mean;
    squares += v * v;
  }
  const float scale = 1.0f / sqrtf(block_reduce<kBlock>(squares, 0.0f, part, Add()) / float(p.H) + p.eps);
  for (int i = threadIdx.x; i < p.H; i += kBlock)
    out[i] = to_bf16((to_float(x[i]) - mean) * scale * to_float(p.weight[i]) + to_float(p.bias[i]));
}

}  // namespace

void layer_norm(const Params& p, Stream stream) {
  const bool vector = p.H <= kChunks * kChunk && p.H % 8 == 0 && p.x_stride % 8 == 0 && p.out_stride % 8 == 0 &&
                      aligned16(p.x) && aligned16(p.weight) && aligned16(p.bias) && aligned16(p.out);
  if (vector)
    gpu::launch(layer_norm_kernel, dim3(ceil_div(p.T, kRowsPerBlock)), dim3(kRowsPerBlock * kWarp), 0, stream, p);
  else
    gpu::launch(layer_norm_any_kernel, dim3(p.T), dim3(kBlock), 0, stream, p);
}

}  // namespace kimi::cuda
