#include "ops/rms_norm.h"

#include "cuda/device.cuh"

namespace kimi::cuda {
namespace {

constexpr int kBlock = 256;       // threads a wide row has
constexpr int kRowsPerBlock = 4;  // of rows that a warp has

// Words: 32-bit words, of two bf16 each.
template <int Words>
PTX_FN void load_words(const bf16* from, unsigned (&w)[Words]) {
  if constexpr (Words == 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    w[0] = v.x, w[1] = v.y;
  }
}

template <int Words>
PTX_FN void store_words(bf16* to, const unsigned (&w)[Words]) {
  if constexpr (Words == 4)
    *reinterpret_cast<uint4*>(to) = {w[0], w[1], w[2], w[3]};
  else
    *reinterpret_cast<uint2*>(to) = {w[0], w[1]};
}

// `Lanes` threads a row, one warp or the block; they hold it in registers, Chunks steps each, between reading and
// writing. A step is eight elements, 16 bytes of x; with a residual it is four, 16 bytes of that, so that neighbouring
// threads read neighbouring bytes. The weight is read before the sum is known: one trip to memory, not two.
template <bool Residual, int Lanes, int Chunks>
__global__ void __launch_bounds__(Lanes == kWarp ? kRowsPerBlock * kWarp : Lanes)
    rms_norm_kernel(const bf16* x, int64_t x_stride, float* residual, int64_t residual_stride, const bf16* weight,
                    bf16* out, int64_t out_stride, int T, int H, float eps) {
  constexpr int kStep = Residual ? 4 : 8, kWords = kStep / 2;
  const int64_t row = Lanes == kWarp ? blockIdx.x * kRowsPerBlock + threadIdx.x / kWarp : blockIdx.x;
  if (row >= T) return;  // whole warps; never of a block that has one row
  const int first = threadIdx.x % Lanes * kStep;
  x += row * x_stride, out += row * out_stride;
  if constexpr (Residual) residual += row * residual_stride;

  unsigned packed[Chunks][kWords] = {}, w[Chunks][kWords];
  float v[Chunks][kStep] = {};
#pragma unroll
  for (int c = 0; c < Chunks; ++c) {
    const int i = first + c * Lanes * kStep;
    if (i >= H) break;
    load_words(x + i, packed[c]);
    load_words(weight + i, w[c]);
    if constexpr (Residual) {
      const float4 r = *reinterpret_cast<const float4*>(residual + i);
      v[c][0] = r.x, v[c][1] = r.y, v[c][2] = r.z, v[c][3] = r.w;
    }
  }
  float sum = 0;
#pragma unroll
  for (int c = 0; c < Chunks; ++c) {
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      const unsigned word = packed[c][j / 2];
      const float value = j % 2 ? ptx::high_bf16(word) : ptx::low_bf16(word);
      v[c][j] = Residual ? v[c][j] + value : value;
      sum += v[c][j] * v[c][j];
    }
    const int i = first + c * Lanes * kStep;
    if (Residual && i < H) *reinterpret_cast<float4*>(residual + i) = {v[c][0], v[c][1], v[c][2], v[c][3]};
  }
  if constexpr (Lanes == kWarp) {
    sum = warp_reduce(sum, Add());
  } else {
    GPU_SHARED(part, float[Lanes / kWarp]);
    sum = block_reduce<Lanes>(sum, 0.0f, part, Add());
  }
  const float scale = 1.0f / sqrtf(sum / float(H) + eps);
#pragma unroll
  for (int c = 0; c < Chunks; ++c) {
    const int i = first + c * Lanes * kStep;
    if (i >= H) break;
#pragma unroll
    for (int j = 0; j < kWords; ++j)
      packed[c][j] = ptx::pack_bf16(v[c][2 * j] * scale * ptx::low_bf16(w[c][j]),
                                    v[c][2 * j + 1] * scale * ptx::high_bf16(w[c][j]));
    store_words(out + i, packed[c]);
  }
}

// Any width, stride and alignment: a block a row, element by element, read again for the second pass.
template <bool Residual>
__global__ void __launch_bounds__(kBlock)
    rms_norm_any_kernel(const bf16* x, int64_t x_stride, float* residual, int64_t residual_stride, const bf16* weight,
                        bf16* out, int64_t out_stride, int, int H, float eps) {
  GPU_SHARED(part, float[kBlock / kWarp]);
  x += blockIdx.x * x_stride, out += blockIdx.x * out_stride;
  if constexpr (Residual) residual += blockIdx.x * residual_stride;
  float sum = 0;
  for (int i = threadIdx.x; i < H; i += kBlock) {
    float v = to_float(x[i]);
    if constexpr (Residual) residual[i] = v += residual[i];
    sum += v * v;
  }
  sum = block_reduce<kBlock>(sum, 0.0f, part, Add());
  const float scale = 1.0f / sqrtf(sum / float(H) + eps);
  for (int i = threadIdx.x; i < H; i += kBlock) {
    float v;
    if constexpr (Residual)
      v = residual[i];
    else
      v = to_float(x[i]);
    out[i] = to_bf16(v * scale * to_float(weight[i]));
  }
}

}  // namespace

void rms_norm(const RmsNormParams<bf16>& p, Stream stream) {
  constexpr int kWarpChunks = 6, kBlockChunks = 4;  // rows to 1536 and to 8192
  const bool vector = p.H % 8 == 0 && p.x_stride % 8 == 0 && p.out_stride % 8 == 0 && aligned16(p.x) &&
                      aligned16(p.weight) && aligned16(p.out);
  auto* kernel = rms_norm_any_kernel<false>;
  dim3 grid(p.T), block(kBlock);
  if (vector && p.H <= kWarp * kWarpChunks * 8) {
    kernel = rms_norm_kernel<false, kWarp, kWarpChunks>;
    grid = dim3(ceil_div(p.T, kRowsPerBlock)), block = dim3(kRowsPerBlock * kWarp);
  } else if (vector && p.H <= kBlock * kBlockChunks * 8) {
    kernel = rms_norm_kernel<false, kBlock, kBlockChunks>;
  }
  gpu::launch(kernel, grid, block, 0, stream, p.x, p.x_stride, nullptr, int64_t(0), p.weight, p.out, p.out_stride, p.T,
              p.H, p.eps);
}

void fused_add_rms_norm(const FusedAddRmsNormParams<bf16>& p, Stream stream) {
  constexpr int kChunks = 8;  // rows to 8192
  const bool vector = p.H % 4 == 0 && p.x_stride % 4 == 0 && p.residual_stride % 4 == 0 && p.out_stride % 4 == 0 &&
                      p.H <= kBlock * kChunks * 4 && aligned16(p.x) && aligned16(p.residual) && aligned16(p.weight) &&
                      aligned16(p.out);
  gpu::launch(vector ? rms_norm_kernel<true, kBlock, kChunks> : rms_norm_any_kernel<true>, dim3(p.T), dim3(kBlock), 0,
              stream, p.x, p.x_stride, p.residual, p.residual_stride, p.weight, p.out, p.out_stride, p.T, p.H, p.eps);
}

}  // namespace kimi::cuda
