// Integer products for AVX-512 with VNNI. As for AVX2, with blocks of 512 inputs: 64 bytes of weights hold four groups,
// one in each 128-bit lane, and `vpdpbusd` adds four products at once. Sums come out group 4 j + l in dword j of lane
// l.
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

constexpr int kBlock = 512, kGroups = kBlock / 32, kRows = 4, kTokens = 16;

template <int Digits>
struct Block {
  int8_t q[Digits][4][2][64];    // [high, low][128 inputs][even, odd]
  float d[kGroups], c[kGroups];  // c = -8 d sum(q)
};

int blocks_of(int n) { return (n + kBlock - 1) / kBlock; }

size_t row_bytes(int n, int digits) { return blocks_of(n) * (digits == 1 ? sizeof(Block<1>) : sizeof(Block<2>)); }

// 32 integers of byte size: the even ones, then the odd ones, 16 each.
void store_bytes(__m512i first, __m512i second, int8_t* even, int8_t* odd) {
  const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(even),
                   _mm512_cvtepi32_epi8(_mm512_permutex2var_epi32(first, evens, second)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(odd),
                   _mm512_cvtepi32_epi8(_mm512_permutex2var_epi32(first, odds, second)));
}

template <int Digits>
void quantize_group(const float* x, int g, Block<Digits>& block) {
  constexpr float kLimit = Digits == 1 ? 127 : 16319;
  const __m512 u = _mm512_loadu_ps(x), v = _mm512_loadu_ps(x + 16);
  // The bits of |x|, as integers: infinity and NaN are larger than any number.
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  const unsigned bits = _mm512_reduce_max_epu32(
      _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(u), mask), _mm512_and_si512(_mm512_castps_si512(v), mask)));
  float largest;
  __builtin_memcpy(&largest, &bits, 4);
  const bool finite = bits < 0x7f800000u, zero = !finite || largest < 1e-30f;  // limit / largest could overflow
  const __m512 factor = _mm512_set1_ps(zero ? 0 : kLimit / largest);
  const __mmask16 keep = zero ? 0 : 0xffff;
  __m512i a = _mm512_maskz_cvtps_epi32(keep, _mm512_mul_ps(u, factor));
  __m512i b = _mm512_maskz_cvtps_epi32(keep, _mm512_mul_ps(v, factor));
  const int sum = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b)), j = g / 4, at = g % 4 * 16;
  if constexpr (Digits == 2) {
    const __m512i half = _mm512_set1_epi32(64);
    const __m512i high_a = _mm512_srai_epi32(_mm512_add_epi32(a, half), 7);
    const __m512i high_b = _mm512_srai_epi32(_mm512_add_epi32(b, half), 7);
    store_bytes(_mm512_sub_epi32(a, _mm512_slli_epi32(high_a, 7)), _mm512_sub_epi32(b, _mm512_slli_epi32(high_b, 7)),
                &block.q[1][j][0][at], &block.q[1][j][1][at]);
    a = high_a, b = high_b;
  }
  store_bytes(a, b, &block.q[0][j][0][at], &block.q[0][j][1][at]);
  const float d = !finite ? __builtin_nanf("") : zero ? 0 : largest / kLimit;
  block.d[g % 4 * 4 + j] = d, block.c[g % 4 * 4 + j] = -8 * d * float(sum);
}

template <int Digits>
void quantize_row(const float* x, int n, Block<Digits>* blocks) {
  const int groups = n / 32, all = blocks_of(n) * kGroups;
  for (int g = 0; g < groups; g++) quantize_group(x + 32 * g, g % kGroups, blocks[g / kGroups]);
  const float none[32] = {};
  for (int g = groups; g < all; g++) quantize_group(none, g % kGroups, blocks[g / kGroups]);
}

void quantize(const float* x, int n, int digits, void* row) {
  if (digits == 1) return quantize_row(x, n, static_cast<Block<1>*>(row));
  quantize_row(x, n, static_cast<Block<2>*>(row));
}

// A block of a row of weights as bytes.
struct Weights {
  __m512i q[4][2];
  __m512 scale;

  Weights(const uint8_t* w, const bf16* s) {
    const __m512i nibble = _mm512_set1_epi8(15);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m512i v = _mm512_loadu_si512(w + 64 * j);
      q[j][0] = _mm512_and_si512(v, nibble);
      q[j][1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
    }
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s));
    const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    scale = _mm512_castsi512_ps(_mm512_permutexvar_epi32(order, wide));
  }
};

// The sums of four dwords in each lane of a, b, c and d, side by side.
__m512i sums_of_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

template <int Digits>
__m512 add_block(const Weights& w, const Block<Digits>& x, __m512 sum) {
  __m512i v[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    v[j] = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int digit = 0; digit < Digits; digit++) {
      if (digit) v[j] = _mm512_slli_epi32(v[j], 7);
      v[j] = _mm512_dpbusd_epi32(v[j], w.q[j][0], _mm512_loadu_si512(x.q[digit][j][0]));
      v[j] = _mm512_dpbusd_epi32(v[j], w.q[j][1], _mm512_loadu_si512(x.q[digit][j][1]));
    }
  }
  const __m512 p = _mm512_cvtepi32_ps(sums_of_lanes(v[0], v[1], v[2], v[3]));
  return _mm512_fmadd_ps(w.scale, _mm512_fmadd_ps(p, _mm512_loadu_ps(x.d), _mm512_loadu_ps(x.c)), sum);
}

float sum_lanes(__m512 v) { return _mm512_reduce_add_ps(v); }

struct Matrix {
  const uint8_t* w;
  int64_t w_stride;
  const bf16* scale;
  int64_t scale_stride;
  int n;

  Matrix skip(int r) const { return {w + r * w_stride, w_stride, scale + r * scale_stride, scale_stride, n}; }
  // Block b of row r. The last one may be cut off by the end of the row: what is missing counts as zeros.
  Weights block(int r, int b) const {
    const uint8_t* packed = w + r * w_stride + b * (kBlock / 2);
    const bf16* scales = scale + r * scale_stride + b * kGroups;
    const int groups = n / 32 - b * kGroups;
    return groups < kGroups ? cut(packed, scales, groups) : Weights(packed, scales);
  }

  __attribute__((noinline)) static Weights cut(const uint8_t* w, const bf16* s, int groups) {
    uint8_t packed[kBlock / 2] = {};
    bf16 scales[kGroups] = {};
    __builtin_memcpy(packed, w, groups * 16), __builtin_memcpy(scales, s, groups * sizeof(bf16));
    return Weights(packed, scales);
  }
};

// One token: sums stay in registers, and what the next rows of weights will need is asked for ahead.
template <int Digits>
void dot_one(const Block<Digits>* x, const Matrix& m, int rows, float* out) {
  constexpr int kAhead = 1024;  // bytes
  __m512 sum[kRows];
  for (auto& s : sum) s = _mm512_setzero_ps();
  for (int b = 0; b < blocks_of(m.n); b++)
    for (int r = 0; r < rows; r++) {
      const uint8_t* ahead = m.w + r * m.w_stride + b * (kBlock / 2) + kAhead;
      for (int i = 0; i < kBlock / 2; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T0);
      sum[r] = add_block(m.block(r, b), x[b], sum[r]);
    }
  for (int r = 0; r < rows; r++) out[r] = sum_lanes(sum[r]);
}

// Up to kTokens tokens: a block of weights is unpacked once for all of them, sums pass through the L1 cache.
template <int Digits>
void dot_some(const Block<Digits>* const* x, int tokens, const Matrix& m, int rows, float* out, int out_stride) {
  __m512 sum[kTokens][kRows];
  for (int t = 0; t < tokens; t++)
    for (auto& s : sum[t]) s = _mm512_setzero_ps();
  for (int b = 0; b < blocks_of(m.n); b++)
    for (int r = 0; r < rows; r++) {
      const Weights w = m.block(r, b);
      for (int t = 0; t < tokens; t++) sum[t][r] = add_block(w, x[t][b], sum[t][r]);
    }
  for (int t = 0; t < tokens; t++)
    for (int r = 0; r < rows; r++) out[t * out_stride + r] = sum_lanes(sum[t][r]);
}

template <int Digits>
void dot_all(const void* const* x, int tokens, const Matrix& m, int rows, float* out, int out_stride) {
  for (int t = 0; t < tokens; t += kTokens)
    for (int r = 0; r < rows; r += kRows) {
      const int some = tokens - t < kTokens ? tokens - t : kTokens, few = rows - r < kRows ? rows - r : kRows;
      const auto* const* rows_of_x = reinterpret_cast<const Block<Digits>* const*>(x) + t;
      float* to = out + t * out_stride + r;
      if (some > 1)
        dot_some(rows_of_x, some, m.skip(r), few, to, out_stride);
      else if (few == kRows)
        dot_one(*rows_of_x, m.skip(r), kRows, to);
      else
        dot_one(*rows_of_x, m.skip(r), few, to);
    }
}

void dot(const void* const* x, int tokens, int digits, const uint8_t* w, int64_t w_stride, const bf16* scale,
         int64_t scale_stride, int rows, int n, float* out, int out_stride) {
  const Matrix m{w, w_stride, scale, scale_stride, n};
  if (digits == 1) return dot_all<1>(x, tokens, m, rows, out, out_stride);
  dot_all<2>(x, tokens, m, rows, out, out_stride);
}

}  // namespace

const QuantizedKernels avx512_quantized_kernels = {.row_bytes = row_bytes, .quantize = quantize, .dot = dot};

}  // namespace kimi::cpu
