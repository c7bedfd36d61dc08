// What products with int8 weights share on AVX2 and on AVX-512: rows as they lie for a few tokens, and the way of 16
// rows into a panel.
#pragma once
#include <immintrin.h>

#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

constexpr int kGroups = kInt8Block / 32;
constexpr int kPanelRows = 16;
constexpr int kAhead = 2048;  // bytes of weights that are asked for ahead

int least(int a, int b) { return a < b ? a : b; }

__m128i load_row(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }

// The scales of a block that the end of the matrix cuts off, filled up with zeros.
struct LastScales {
  bf16 scale[kGroups] = {};

  LastScales(const bf16* from, int groups) { __builtin_memcpy(scale, from, groups * sizeof(bf16)); }
};

// One token reads row after row. More read four rows at a time, so that their blocks of x serve four times from L1.
// Isa has the eight or sixteen sums of a product: Sum, zero, add_block<kTokens> for a block of a row, sum_of.
template <class Isa, int kTokens>
void dot_rows(const Int8Block* x, int64_t x_stride, const int8_t* w, const bf16* scale, int rows, int n, float* out,
              int64_t out_stride) {
  constexpr int kRows = kTokens == 1 ? 1 : 4;
  const int whole = n / kInt8Block, left = n % kInt8Block / 32;
  const int8_t* ahead = w + int64_t(kRows - 1) * n + kAhead;
  const auto ask_ahead = [&](int bytes) {
    for (int i = 0; i < bytes; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T0);
    ahead += bytes;
  };
  for (int first = 0; first < rows; first += kRows) {
    const int few = least(kRows, rows - first);
    const int8_t* from = w + int64_t(first) * n;
    const bf16* scales = scale + int64_t(first) * (n / 32);
    typename Isa::Sum sum[kRows][kTokens];
    for (auto& row : sum)
      for (auto& s : row) s = Isa::zero();
    for (int b = 0; b < whole; b++)
      for (int r = 0; r < few; r++) {
        ask_ahead(kInt8Block);
        Isa::template add_block<kTokens>(from + int64_t(r) * n + b * kInt8Block,
                                         scales + int64_t(r) * (n / 32) + b * kGroups, kGroups, x + b * x_stride,
                                         sum[r]);
      }
    if (left)
      for (int r = 0; r < few; r++) {
        ask_ahead(32 * left);
        const bf16* at = scales + int64_t(r) * (n / 32) + whole * kGroups;
        const bool eight = int64_t(rows - 1 - first - r) * (n / 32) >= kGroups - left;  // can be read from there
        const int8_t* weights = from + int64_t(r) * n + whole * kInt8Block;
        Isa::template add_block<kTokens>(weights, eight ? at : LastScales(at, left).scale, left, x + whole * x_stride,
                                         sum[r]);
      }
    for (int r = 0; r < few; r++)
      for (int t = 0; t < kTokens; t++) out[t * out_stride + first + r] = Isa::sum_of(sum[r][t]);
  }
}

// Word j of 16 rows of eight, j < 8: rows 0 to 7 in the low lane, 8 to 15 in the high one.
void transpose(const void* const (&rows)[kPanelRows], __m256i (&words)[8]) {
  __m256i v[8], u[8];
  for (int r = 0; r < 8; r++) v[r] = _mm256_set_m128i(load_row(rows[r + 8]), load_row(rows[r]));
  for (int r = 0; r < 4; r++) {
    u[r] = _mm256_unpacklo_epi16(v[2 * r], v[2 * r + 1]);
    u[r + 4] = _mm256_unpackhi_epi16(v[2 * r], v[2 * r + 1]);
  }
  for (int h = 0; h < 2; h++)
    for (int r = 0; r < 2; r++) {
      v[4 * h + r] = _mm256_unpacklo_epi32(u[4 * h + 2 * r], u[4 * h + 2 * r + 1]);
      v[4 * h + 2 + r] = _mm256_unpackhi_epi32(u[4 * h + 2 * r], u[4 * h + 2 * r + 1]);
    }
  for (int j = 0; j < 4; j++) {
    words[2 * j] = _mm256_unpacklo_epi64(v[2 * j], v[2 * j + 1]);
    words[2 * j + 1] = _mm256_unpackhi_epi64(v[2 * j], v[2 * j + 1]);
  }
}

}  // namespace
}  // namespace kimi::cpu
