// Products with int8 weights for AVX2: weights are widened to int16 as they are read, `vpmaddwd` takes them by those of
// x, and the eight sums of a group become floats once.
//
// A few tokens read the weights row by row, as they lie. More share a panel of 16 rows, transposed so that each lane
// belongs to a row.
#include <immintrin.h>

#include "cpu/isa/int8_rows.h"
#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

constexpr int kTileTokens = 4;

__m256i load(const void* at) { return _mm256_load_si256(static_cast<const __m256i*>(at)); }
__m256 widen(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }  // bf16

float sum_lanes(__m256 v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
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

float from_bits(unsigned bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

void quantize(const float* x, int n, Int8Block* blocks, int64_t stride) {
  constexpr unsigned kExponent = 1u << 23;  // one in the exponent of a float
  for (int g = 0; g < n / 32; g++, x += 32) {
    Int8Block& block = blocks[g / kGroups * stride];
    __m256 v[4];
    for (int i = 0; i < 4; i++) v[i] = _mm256_loadu_ps(x + 8 * i);
    const unsigned bits = largest_bits(v), power = bits & 0x7f800000;  // power: as a float, the power of two below
    const bool finite = bits < 0x7f800000, zero = !finite || power < (127 - 100) * kExponent;
    block.d[g % kGroups] = !finite ? __builtin_nanf("") : zero ? 0 : from_bits(power - 14 * kExponent);
    const __m256 factor = _mm256_set1_ps(from_bits(zero ? 0 : (254 + 14) * kExponent - power));
    const __m256i keep = _mm256_set1_epi32(zero ? 0 : -1);
    __m256i q[4];
    for (int i = 0; i < 4; i++) q[i] = _mm256_and_si256(_mm256_cvtps_epi32(_mm256_mul_ps(v[i], factor)), keep);
    for (int i = 0; i < 2; i++)
      _mm256_store_si256(reinterpret_cast<__m256i*>(block.q + g % kGroups * 32 + 16 * i),
                         _mm256_permute4x64_epi64(_mm256_packs_epi32(q[2 * i], q[2 * i + 1]), 0xd8));
  }
}

struct Avx2 {
  using Sum = __m256;
  static Sum zero() { return _mm256_setzero_ps(); }
  static float sum_of(Sum v) { return sum_lanes(v); }

  // sums[t] += x[t] . w, of `groups` groups of a block. Every other group has a sum of its own: one chain of additions
  // would take longer than the rest.
  template <int kTokens>
  [[gnu::always_inline]] static inline void add_block(const int8_t* w, const bf16* scale, int groups,
                                                      const Int8Block* x, __m256 (&sums)[kTokens]) {
    alignas(32) float scaled[kTokens][kGroups];
    const __m256 s = widen(load_row(scale));
    __m256 even[kTokens], odd[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; t++) {
      _mm256_store_ps(scaled[t], _mm256_mul_ps(s, _mm256_load_ps(x[t].d)));
      even[t] = sums[t], odd[t] = zero();
    }
    const auto add = [&](int g, __m256(&sum)[kTokens]) [[gnu::always_inline]] {
      const __m256i first = _mm256_cvtepi8_epi16(load_row(w + 32 * g));
      const __m256i second = _mm256_cvtepi8_epi16(load_row(w + 32 * g + 16));
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; t++) {
        const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(first, load(x[t].q + 32 * g)),
                                                  _mm256_madd_epi16(second, load(x[t].q + 32 * g + 16)));
        sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_broadcast_ss(&scaled[t][g]), sum[t]);
      }
    };
    int g = 0;
    for (; g + 2 <= groups; g += 2) add(g, even), add(g + 1, odd);
    if (g < groups) add(g, even);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; t++) sums[t] = _mm256_add_ps(even[t], odd[t]);
  }
};

// A block of 16 rows as int16. Of a strip with fewer rows the last one is repeated.
struct Panel {
  alignas(64) int16_t q[kGroups][16][2][16];  // [group][pair of inputs][half of the rows][row, input of the pair]
  float scale[kGroups][2][8];

  void fill(const int8_t* w, const bf16* scales, int rows, int n, int groups) {
    const auto row = [&](int r) { return int64_t(least(r, rows - 1)) * n; };
    const void* at[kPanelRows];
    __m256i words[8];
    for (int i = 0; i < 32 * groups; i += 16) {
      for (int r = 0; r < kPanelRows; r++) {
        at[r] = w + row(r) + i;
        if (i % 64 == 0) _mm_prefetch(w + row(r) + i + kInt8Block, _MM_HINT_T1);  // the next panel of the rows
      }
      transpose(at, words);
      for (int j = 0; j < 8; j++)
        for (int h = 0; h < 2; h++) {
          const __m128i half = h ? _mm256_extracti128_si256(words[j], 1) : _mm256_castsi256_si128(words[j]);
          _mm256_store_si256(reinterpret_cast<__m256i*>(q[i / 32][i % 32 / 2 + j][h]), _mm256_cvtepi8_epi16(half));
        }
    }
    alignas(16) bf16 last[kPanelRows][kGroups] = {};
    for (int r = 0; r < kPanelRows; r++) {
      at[r] = scales + row(r) / 32;
      if (groups < kGroups) at[r] = __builtin_memcpy(last[r], at[r], groups * sizeof(bf16));
    }
    transpose(at, words);
    for (int g = 0; g < kGroups; g++) {
      _mm256_store_ps(scale[g][0], widen(_mm256_castsi256_si128(words[g])));
      _mm256_store_ps(scale[g][1], widen(_mm256_extracti128_si256(words[g], 1)));
    }
  }

  // sums[t][0..16) += x[t] . the rows
  template <int kTokens>
  [[gnu::noinline]] void multiply(const Int8Block* x, int groups, float (*sums)[kPanelRows]) const {
    for (int g = 0; g < groups; g++) {
      __m256i sum[kTokens][2];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        const __m256i first = load(q[g][i][0]), second = load(q[g][i][1]);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; t++) {
          int pair;
          __builtin_memcpy(&pair, x[t].q + 32 * g + 2 * i, 4);
          const __m256i inputs = _mm256_set1_epi32(pair);
          const __m256i a = _mm256_madd_epi16(first, inputs), b = _mm256_madd_epi16(second, inputs);
          sum[t][0] = i ? _mm256_add_epi32(sum[t][0], a) : a, sum[t][1] = i ? _mm256_add_epi32(sum[t][1], b) : b;
          asm("" : "+x"(sum[t][0]), "+x"(sum[t][1]));  // or the compiler reorders the sums and spills them
        }
      }
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; t++) {
        const __m256 d = _mm256_broadcast_ss(&x[t].d[g]);
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
          float* to = sums[t] + 8 * h;
          const __m256 scaled = _mm256_mul_ps(d, _mm256_load_ps(scale[g][h]));
          _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t][h]), scaled, _mm256_loadu_ps(to)));
        }
      }
    }
  }
};

// Block after block, each for all rows while the tokens' x is near.
void dot_panels(const Int8Block* x, int64_t x_stride, int tokens, const int8_t* w, const bf16* scale, int rows, int n,
                float* out, int64_t out_stride) {
  constexpr decltype(&Panel::multiply<1>) kTiles[] = {&Panel::multiply<1>, &Panel::multiply<2>, &Panel::multiply<3>,
                                                      &Panel::multiply<4>};
  Panel panel;
  alignas(64) float sums[kInt8Rows / kPanelRows][kInt8Tokens][kPanelRows] = {};
  for (int begin = 0; begin < n; begin += kInt8Block, x += x_stride)
    for (int r = 0; r < rows; r += kPanelRows) {
      const int groups = least(kInt8Block, n - begin) / 32;
      panel.fill(w + int64_t(r) * n + begin, scale + (int64_t(r) * n + begin) / 32, least(kPanelRows, rows - r), n,
                 groups);
      for (int t = 0; t < tokens; t += kTileTokens)
        (panel.*kTiles[least(kTileTokens, tokens - t) - 1])(x + t, groups, sums[r / kPanelRows] + t);
    }
  for (int t = 0; t < tokens; t++)
    for (int r = 0; r < rows; r += kPanelRows)
      __builtin_memcpy(out + t * out_stride + r, sums[r / kPanelRows][t], least(kPanelRows, rows - r) * sizeof(float));
}

void dot(const Int8Block* x, int64_t x_stride, int tokens, const int8_t* w, const bf16* scale, int rows, int n,
         float* out, int64_t out_stride) {
  constexpr decltype(&dot_rows<Avx2, 1>) kFew[] = {dot_rows<Avx2, 1>, dot_rows<Avx2, 2>, dot_rows<Avx2, 3>,
                                                   dot_rows<Avx2, 4>};
  if (tokens > kFewTokens) return dot_panels(x, x_stride, tokens, w, scale, rows, n, out, out_stride);
  for (int t = 0; t < tokens; t += kTileTokens)
    kFew[least(kTileTokens, tokens - t) - 1](x + t, x_stride, w, scale, rows, n, out + t * out_stride, out_stride);
}

}  // namespace

const Int8Kernels avx2_int8_kernels = {.quantize = quantize, .dot = dot};

}  // namespace kimi::cpu
