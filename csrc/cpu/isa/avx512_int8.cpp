// Products with int8 weights for AVX-512 with VNNI: as for AVX2, and `vpdpwssd` multiplies and adds in one. Blocks of x
// are those of AVX2.
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "cpu/isa/int8_rows.h"
#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

constexpr int kFewTile = 4, kTileTokens = 8;

__m256i load_half(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

struct Avx512 {
  using Sum = __m512;
  static Sum zero() { return _mm512_setzero_ps(); }
  static float sum_of(Sum v) { return _mm512_reduce_add_ps(v); }

  // sums[t] += x[t] . w, of `groups` groups of a block.
  template <int kTokens>
  [[gnu::always_inline]] static inline void add_block(const int8_t* w, const bf16* scale, int groups,
                                                      const Int8Block* x, __m512 (&sums)[kTokens]) {
    alignas(32) float scaled[kTokens][kGroups];
    const __m256 s = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_row(scale)), 16));
    __m512 sum[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; t++) {
      _mm256_store_ps(scaled[t], _mm256_mul_ps(s, _mm256_load_ps(x[t].d)));
      sum[t] = sums[t];
    }
#pragma GCC unroll 2
    for (int g = 0; g < groups; g++) {
      const __m512i weights = _mm512_cvtepi8_epi16(load_half(w + 32 * g));
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; t++) {
        const __m512i products =
            _mm512_dpwssd_epi32(_mm512_setzero_si512(), weights, _mm512_loadu_si512(x[t].q + 32 * g));
        sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_set1_ps(scaled[t][g]), sum[t]);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; t++) sums[t] = sum[t];
  }
};

// A block of 16 rows as int16. Of a strip with fewer rows the last one is repeated.
struct Panel {
  alignas(64) int16_t q[kGroups][16][kPanelRows][2];  // [group][pair of inputs][row][input of the pair]
  float scale[kGroups][kPanelRows];

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
      for (int j = 0; j < 8; j++) _mm512_store_si512(q[i / 32][i % 32 / 2 + j], _mm512_cvtepi8_epi16(words[j]));
    }
    alignas(16) bf16 last[kPanelRows][kGroups] = {};
    for (int r = 0; r < kPanelRows; r++) {
      at[r] = scales + row(r) / 32;
      if (groups < kGroups) at[r] = __builtin_memcpy(last[r], at[r], groups * sizeof(bf16));
    }
    transpose(at, words);
    for (int g = 0; g < kGroups; g++)
      _mm512_store_si512(scale[g], _mm512_slli_epi32(_mm512_cvtepu16_epi32(words[g]), 16));
  }

  // sums[t][0..16) += x[t] . the rows
  template <int kTokens>
  [[gnu::noinline]] void multiply(const Int8Block* x, int groups, float (*sums)[kPanelRows]) const {
    for (int g = 0; g < groups; g++) {
      __m512i sum[kTokens];
      for (auto& s : sum) s = _mm512_setzero_si512();
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        const __m512i weights = _mm512_load_si512(q[g][i]);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; t++) {
          int pair;
          __builtin_memcpy(&pair, x[t].q + 32 * g + 2 * i, 4);
          sum[t] = _mm512_dpwssd_epi32(sum[t], weights, _mm512_set1_epi32(pair));
        }
      }
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; t++) {
        const __m512 scaled = _mm512_mul_ps(_mm512_set1_ps(x[t].d[g]), _mm512_load_ps(scale[g]));
        _mm512_storeu_ps(sums[t], _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t]), scaled, _mm512_loadu_ps(sums[t])));
      }
    }
  }
};

// Block after block, each for all rows while the tokens' x is near.
void dot_panels(const Int8Block* x, int64_t x_stride, int tokens, const int8_t* w, const bf16* scale, int rows, int n,
                float* out, int64_t out_stride) {
  constexpr decltype(&Panel::multiply<1>) kTiles[] = {&Panel::multiply<1>, &Panel::multiply<2>, &Panel::multiply<3>,
                                                      &Panel::multiply<4>, &Panel::multiply<5>, &Panel::multiply<6>,
                                                      &Panel::multiply<7>, &Panel::multiply<8>};
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
  constexpr decltype(&dot_rows<Avx512, 1>) kFew[] = {dot_rows<Avx512, 1>, dot_rows<Avx512, 2>, dot_rows<Avx512, 3>,
                                                     dot_rows<Avx512, 4>};
  if (tokens > kFewTokens) return dot_panels(x, x_stride, tokens, w, scale, rows, n, out, out_stride);
  for (int t = 0; t < tokens; t += kFewTile)
    kFew[least(kFewTile, tokens - t) - 1](x + t, x_stride, w, scale, rows, n, out + t * out_stride, out_stride);
}

}  // namespace

const Int8Kernels avx512_int8_kernels = {.quantize = nullptr, .dot = dot};

}  // namespace kimi::cpu
