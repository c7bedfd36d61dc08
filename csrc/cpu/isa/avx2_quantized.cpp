// Integer products for AVX2. Weights are taken from where they lie, 16 bytes a group: `vpmaddubsw` multiplies the
// unsigned nibbles q + 8 by signed bytes of x, and 8 d * sum(x) of each group is taken off again.
//
// Inputs go in blocks of 256, eight groups: 32 bytes of weights hold two groups, one in each 128-bit lane, even inputs
// in the low nibbles. So sums come out as groups 0 2 4 6 in the low lane and 1 3 5 7 in the high one, which is the
// order of d, c and the scales.
#include <immintrin.h>

#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

constexpr int kBlock = 256, kGroups = kBlock / 32, kRows = 4, kTokens = 16;

template <int Digits>
struct Block {
  int8_t q[Digits][4][2][32];    // [high, low][64 inputs][even, odd]
  float d[kGroups], c[kGroups];  // c = -8 d sum(q)
};

int blocks_of(int n) { return (n + kBlock - 1) / kBlock; }

size_t row_bytes(int n, int digits) { return blocks_of(n) * (digits == 1 ? sizeof(Block<1>) : sizeof(Block<2>)); }

__m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

// 32 integers of int16 size to bytes: the even ones, then the odd ones, 16 each.
__m256i bytes_of(const __m256i (&v)[4]) {
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
  const __m256i ordered = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m256i split =
      _mm256_shuffle_epi8(ordered, _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8,
                                                    10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  return _mm256_permute4x64_epi64(split, 0xd8);
}

int sum_of(__m256i v) {
  __m128i a = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  a = _mm_add_epi32(a, _mm_shuffle_epi32(a, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(a, _mm_shuffle_epi32(a, 0xb1)));
}

// The largest bits of |x|, as integers: infinity and NaN are larger than any number.
unsigned largest_bits(const __m256 (&x)[4]) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i m = _mm256_setzero_si256();
  for (__m256 v : x) m = _mm256_max_epu32(m, _mm256_and_si256(_mm256_castps_si256(v), mask));
  __m128i a = _mm_max_epu32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  a = _mm_max_epu32(a, _mm_shuffle_epi32(a, 0x4e));
  return unsigned(_mm_cvtsi128_si32(_mm_max_epu32(a, _mm_shuffle_epi32(a, 0xb1))));
}

template <int Digits>
void quantize_group(const float* x, int g, Block<Digits>& block) {
  constexpr float kLimit = Digits == 1 ? 127 : 16319;
  __m256 v[4];
  for (int i = 0; i < 4; i++) v[i] = _mm256_loadu_ps(x + 8 * i);
  const unsigned bits = largest_bits(v);
  float largest;
  __builtin_memcpy(&largest, &bits, 4);
  const bool finite = bits < 0x7f800000u, zero = !finite || largest < 1e-30f;  // limit / largest could overflow
  const __m256 factor = _mm256_set1_ps(zero ? 0 : kLimit / largest);
  const __m256i keep = _mm256_set1_epi32(zero ? 0 : -1);
  __m256i q[4], sum = _mm256_setzero_si256();
  for (int i = 0; i < 4; i++) {
    q[i] = _mm256_and_si256(_mm256_cvtps_epi32(_mm256_mul_ps(v[i], factor)), keep);
    sum = _mm256_add_epi32(sum, q[i]);
  }
  if constexpr (Digits == 2) {
    __m256i low[4];
    for (int i = 0; i < 4; i++) {
      const __m256i high = _mm256_srai_epi32(_mm256_add_epi32(q[i], _mm256_set1_epi32(64)), 7);
      low[i] = _mm256_sub_epi32(q[i], _mm256_slli_epi32(high, 7));
      q[i] = high;
    }
    const __m256i b = bytes_of(low);
    _mm256_storeu2_m128i(reinterpret_cast<__m128i*>(&block.q[1][g / 2][1][g % 2 * 16]),
                         reinterpret_cast<__m128i*>(&block.q[1][g / 2][0][g % 2 * 16]), b);
  }
  const __m256i b = bytes_of(q);
  _mm256_storeu2_m128i(reinterpret_cast<__m128i*>(&block.q[0][g / 2][1][g % 2 * 16]),
                       reinterpret_cast<__m128i*>(&block.q[0][g / 2][0][g % 2 * 16]), b);
  const float d = !finite ? __builtin_nanf("") : zero ? 0 : largest / kLimit;
  const int at = g / 2 + g % 2 * 4;
  block.d[at] = d, block.c[at] = -8 * d * float(sum_of(sum));
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
  __m256i q[4][2];
  __m256 scale;

  Weights(const uint8_t* w, const bf16* s) {
    const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m256i v = load(w + 32 * j);
      q[j][0] = _mm256_and_si256(v, nibble);
      q[j][1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
    }
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(s));
    const __m128i even = _mm_slli_epi32(v, 16), odd = _mm_and_si128(v, _mm_set1_epi32(int(0xffff0000)));
    scale = _mm256_castsi256_ps(_mm256_set_m128i(odd, even));
  }
};

// The sums of eight groups, exact: 8, 16 and then 32 products of at most 15 * 127, the first two of which fit int16.
__m256i products(const Weights& w, const int8_t (&x)[4][2][32]) {
  const __m256i one = _mm256_set1_epi16(1);
  __m256i v[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++)
    v[j] = _mm256_madd_epi16(_mm256_add_epi16(_mm256_maddubs_epi16(w.q[j][0], load(x[j][0])),
                                              _mm256_maddubs_epi16(w.q[j][1], load(x[j][1]))),
                             one);
  const __m256i a = _mm256_madd_epi16(_mm256_packs_epi32(v[0], v[1]), one);
  const __m256i b = _mm256_madd_epi16(_mm256_packs_epi32(v[2], v[3]), one);
  return _mm256_madd_epi16(_mm256_packs_epi32(a, b), one);
}

template <int Digits>
__m256 add_block(const Weights& w, const Block<Digits>& x, __m256 sum) {
  __m256i p = products(w, x.q[0]);
  if constexpr (Digits == 2) p = _mm256_add_epi32(_mm256_slli_epi32(p, 7), products(w, x.q[1]));
  const __m256 scaled = _mm256_fmadd_ps(_mm256_cvtepi32_ps(p), _mm256_loadu_ps(x.d), _mm256_loadu_ps(x.c));
  return _mm256_fmadd_ps(w.scale, scaled, sum);
}

float sum_lanes(__m256 v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}

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
  __m256 sum[kRows];
  for (auto& s : sum) s = _mm256_setzero_ps();
  for (int b = 0; b < blocks_of(m.n); b++)
    for (int r = 0; r < rows; r++) {
      const uint8_t* ahead = m.w + r * m.w_stride + b * (kBlock / 2) + kAhead;
      _mm_prefetch(ahead, _MM_HINT_T0), _mm_prefetch(ahead + 64, _MM_HINT_T0);
      sum[r] = add_block(m.block(r, b), x[b], sum[r]);
    }
  for (int r = 0; r < rows; r++) out[r] = sum_lanes(sum[r]);
}

// Up to kTokens tokens: a block of weights is unpacked once for all of them, sums pass through the L1 cache.
template <int Digits>
void dot_some(const Block<Digits>* const* x, int tokens, const Matrix& m, int rows, float* out, int out_stride) {
  __m256 sum[kTokens][kRows];
  for (int t = 0; t < tokens; t++)
    for (auto& s : sum[t]) s = _mm256_setzero_ps();
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

const QuantizedKernels avx2_quantized_kernels = {.row_bytes = row_bytes, .quantize = quantize, .dot = dot};

}  // namespace kimi::cpu
