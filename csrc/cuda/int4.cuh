// Products of bf16 rows with weight rows as they lie on disk, by mma.m16n8k16 with the weights as operand A.
//
// A and B may permute k as they like if both do so alike. Lane (g, t) = (lane / 4, lane % 4) takes whole 16 bytes of
// each row: of INT4 four words, which are group t of 128 inputs, so that one scale fits all; of x the 8 inputs that one
// word stands for. Nothing is repacked.
#pragma once

#include "cuda/device.cuh"
#include "ops/gemm_int4.h"

namespace kimi::cuda {

// q * scale rounded once to bf16, as dequantize_int4 has it: pairs[i] holds inputs i and i + 4 of the word. `scale` is
// in both halves. 0x4300 is 128, whose last bit is worth 1, so 128 + nibble - 136 is exact.
PTX_FN void dequantize(unsigned word, unsigned scale, unsigned (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned shifted = ptx::lop3<0xea>(word >> (4 * i), 0x000f000f, 0x43004300);  // (a & b) | c
    pairs[i] = ptx::mul_bf16x2(ptx::sub_bf16x2(shifted, 0x43084308), scale);
  }
}

PTX_FN unsigned both_halves(bf16 v) { return v.bits * 0x10001u; }

PTX_FN unsigned word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Eight inputs of a row of x, as operand B of two steps of 16: the inputs of step s that dequantize puts into
// pairs[2 * s] and pairs[2 * s + 1].
PTX_FN void pair_like_int4(const uint4& x, unsigned (&b)[2][2]) {
  b[0][0] = __byte_perm(x.x, x.z, 0x5410), b[0][1] = __byte_perm(x.x, x.z, 0x7632);
  b[1][0] = __byte_perm(x.y, x.w, 0x5410), b[1][1] = __byte_perm(x.y, x.w, 0x7632);
}

// Where lane (g, t) finds its 16 bytes number w of 4 in a row of 16 times 16 bytes: of the 8 lanes that shared memory
// serves at once (two rows, four t) no two meet in a bank.
PTX_FN int swizzled(int row, int chunk) { return chunk ^ (chunk >> 3) ^ ((row & 1) << 1); }

// Eight bf16 from `at`, `valid` of which exist; zeros for the rest.
PTX_FN uint4 load8(const bf16* at, int valid, bool vector) {
  if (valid <= 0) return {0, 0, 0, 0};
  if (vector) return *reinterpret_cast<const uint4*>(at);
  unsigned v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = i < valid ? at[i].bits : 0;
  return {v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16};
}

// The words of one group of a packed row from memory of any alignment, and its scale; zeros past the end.
PTX_FN void load_group(const int32_t* row, const bf16* scales, int group, int groups, uint4& words, unsigned& scale) {
  words = {0, 0, 0, 0}, scale = 0;
  if (group >= groups) return;
  const int32_t* w = row + 4 * group;
  words = {unsigned(w[0]), unsigned(w[1]), unsigned(w[2]), unsigned(w[3])};
  scale = both_halves(scales[group]);
}

PTX_FN bool aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace kimi::cuda
