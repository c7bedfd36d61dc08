#include "ops/dequantize_int4.h"

#include "cuda/device.cuh"

namespace kimi::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWordsPerGroup = kInt4Group / 8;
constexpr int kWords = 4;  // a thread decodes, a block's width apart: four loads in flight

// Eight nibbles to eight bf16 of q * scale, in order. 0x4300 is 128 in bf16, whose last bit counts 1: or-ing a nibble
// in adds it, and taking 136 off leaves q exactly. The product is rounded once.
PTX_FN uint4 decode(unsigned word, unsigned scale2) {
  unsigned out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned pair = (word >> 8 * i & 0xf) | (word >> 8 * i & 0xf0) << 12;
    out[i] = ptx::mul_bf16x2(ptx::sub_bf16x2(pair | 0x43004300u, 0x43084308u), scale2);
  }
  return {out[0], out[1], out[2], out[3]};
}

// A warp reads 32 neighbouring words (128 bytes) and writes the 512 bytes that they stand for; nothing depends on where
// rows end, as they hold whole groups. Vector: out allows 16-byte stores.
template <bool Vector>
__global__ void __launch_bounds__(kThreads)
    dequantize_int4_kernel(const int32_t* packed, const bf16* scale, bf16* out, int64_t words) {
  const int64_t first = int64_t(blockIdx.x) * (kWords * kThreads) + threadIdx.x;
  unsigned word[kWords], scale2[kWords];
#pragma unroll
  for (int k = 0; k < kWords; ++k)
    if (const int64_t i = first + k * kThreads; i < words)
      word[k] = unsigned(packed[i]), scale2[k] = scale[i / kWordsPerGroup].bits * 0x10001u;
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    const int64_t i = first + k * kThreads;
    if (i >= words) return;
    const uint4 v = decode(word[k], scale2[k]);
    if constexpr (Vector) {
      *reinterpret_cast<uint4*>(out + 8 * i) = v;
    } else {
      const unsigned pairs[4] = {v.x, v.y, v.z, v.w};
      for (int j = 0; j < 8; ++j) out[8 * i + j].bits = uint16_t(pairs[j / 2] >> 16 * (j % 2));
    }
  }
}

// Eight neighbouring lanes a group, four values a lane. Vector: weight allows 16-byte loads.
template <bool Vector>
__global__ void __launch_bounds__(kThreads)
    quantize_int4_kernel(const float* weight, uint16_t* packed, bf16* scale, int64_t groups) {
  constexpr int kLanes = kInt4Group / 4;
  const int64_t part = int64_t(blockIdx.x) * kThreads + threadIdx.x, group = part / kLanes;
  const bool inside = group < groups;  // lanes outside go along, for the shuffles
  float w[4] = {};
  if (inside) {
    if constexpr (Vector) {
      const float4 v = *reinterpret_cast<const float4*>(weight + 4 * part);
      w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    } else {
      for (int j = 0; j < 4; ++j) w[j] = weight[4 * part + j];
    }
  }
  // Without their signs, floats order as their bits do, infinity and NaN last: one maximum finds both facts.
  unsigned largest = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) largest = max(largest, __float_as_uint(w[j]) & 0x7fffffffu);
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, d));
  if (!inside) return;
  const bool finite = largest < 0x7f800000u;
  const bf16 s = finite ? to_bf16(fmaxf(__uint_as_float(largest) / 7.0f, 1e-5f)) : bf16{0x7fc0};
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float q = finite ? fminf(fmaxf(rintf(w[j] / to_float(s)), -7.0f), 7.0f) : 0.0f;
    bits |= unsigned(int(q) + 8) << 4 * j;
  }
  packed[part] = uint16_t(bits);
  if (part % kLanes == 0) scale[group] = s;
}

}  // namespace

void dequantize_int4(const DequantizeInt4Params& p, Stream stream) {
  const int64_t words = int64_t(p.n_out) * (p.n_in / 8);
  gpu::launch(aligned16(p.out) ? dequantize_int4_kernel<true> : dequantize_int4_kernel<false>,
              dim3(ceil_div(words, kWords * kThreads)), dim3(kThreads), 0, stream, p.weight_packed, p.weight_scale,
              p.out, words);
}

void quantize_int4(const QuantizeInt4Params& p, Stream stream) {
  const int64_t groups = int64_t(p.n_out) * (p.n_in / kInt4Group);
  gpu::launch(aligned16(p.weight) ? quantize_int4_kernel<true> : quantize_int4_kernel<false>,
              dim3(ceil_div(groups * (kInt4Group / 4), kThreads)), dim3(kThreads), 0, stream, p.weight,
              reinterpret_cast<uint16_t*>(p.weight_packed), p.weight_scale, groups);
}

}  // namespace kimi::cuda
