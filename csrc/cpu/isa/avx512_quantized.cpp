// Integer products for AVX-512 with VNNI. As for AVX2, with blocks of 512 inputs, and `vpdpbusd` adds four products at
// once. Two digits take 5 instructions for 128 products, and 3 to take the weights apart: int16 would take 4 `vpdpwssd`
// and 7, and panels twice as large.
#include "cpu/isa/avx512_panel.h"

namespace kimi::cpu {
namespace {

constexpr int kPanelTokens = 8;

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

// Adds the products of 128 inputs, J of 4, to sum. scale holds weight scale * d.
template <int Digits, int Tokens, int J>
[[gnu::always_inline]] inline void add_pairs(const uint8_t* w, const Block<Digits>* const* x, int b,
                                             const __m512 (&scale)[Tokens], __m512 (&sum)[Tokens]) {
  __m512i part[2];
  unpack(_mm512_loadu_si512(w + 64 * J), part);
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; t++) {
    __m512i p = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int digit = 0; digit < Digits; digit++) {
      const auto& q = x[t][b].q[digit][J];
      if (digit) p = _mm512_slli_epi32(p, 7);
      p = _mm512_dpbusd_epi32(p, part[0], _mm512_loadu_si512(q[0]));
      p = _mm512_dpbusd_epi32(p, part[1], _mm512_loadu_si512(q[1]));
    }
    sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(p), _mm512_permute_ps(scale[t], J * 0x55), sum[t]);
  }
}

// sum[t] += block b of x[t] . a block of weights
template <int Digits, int Tokens>
[[gnu::always_inline]] inline void add_block(const uint8_t* w, const bf16* scales, const Block<Digits>* const* x, int b,
                                             __m512 (&sum)[Tokens]) {
  const __m256i s = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512 scale =
      _mm512_castsi512_ps(_mm512_permutexvar_epi32(order, _mm512_slli_epi32(_mm512_cvtepu16_epi32(s), 16)));
  __m512 scaled[Tokens], odd[Tokens];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; t++) {
    scaled[t] = _mm512_mul_ps(scale, _mm512_loadu_ps(x[t][b].d));
    sum[t] = _mm512_fmadd_ps(scale, _mm512_loadu_ps(x[t][b].c), sum[t]);
    odd[t] = _mm512_setzero_ps();  // two chains of additions: with one, a single token waits for them
  }
  add_pairs<Digits, Tokens, 0>(w, x, b, scaled, sum), add_pairs<Digits, Tokens, 1>(w, x, b, scaled, odd);
  add_pairs<Digits, Tokens, 2>(w, x, b, scaled, sum), add_pairs<Digits, Tokens, 3>(w, x, b, scaled, odd);
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; t++) sum[t] = _mm512_add_ps(sum[t], odd[t]);
}

// A few rows at a time, so that blocks of several tokens stay in the L1 cache; one token reads row after row.
template <int Digits, int Tokens>
void dot_rows(const Block<Digits>* const* x, const Matrix& m, int rows, float* out, int out_stride) {
  constexpr int kRows = Tokens == 1 ? 1 : 4;
  const int whole = m.n / kBlock, blocks = blocks_of(m.n);
  Prefetch ahead(m, kRows);
  for (int first = 0; first < rows; first += kRows) {
    const int few = rows - first < kRows ? rows - first : kRows;
    __m512 sum[kRows][Tokens];
    for (auto& row : sum)
      for (auto& s : row) s = _mm512_setzero_ps();
    for (int b = 0; b < whole; b++)
      for (int r = 0; r < few; r++) {
        ahead.next_block();
        add_block<Digits, Tokens>(m.packed(first + r, b), m.scales(first + r, b), x, b, sum[r]);
      }
    if (whole < blocks)
      for (int r = 0; r < few; r++) {
        LastBlock last;
        last.load(m, first + r, whole);
        add_block<Digits, Tokens>(last.w, last.scale, x, whole, sum[r]);
      }
    for (int r = 0; r < few; r++)
      for (int t = 0; t < Tokens; t++) out[t * out_stride + first + r] = _mm512_reduce_add_ps(sum[r][t]);
  }
}

template <int Digits>
void dot_few(const Block<Digits>* const* x, int tokens, const Matrix& m, int rows, float* out, int out_stride) {
  if (tokens == 1) return dot_rows<Digits, 1>(x, m, rows, out, out_stride);
  if (tokens == 2) return dot_rows<Digits, 2>(x, m, rows, out, out_stride);
  if (tokens == 3) return dot_rows<Digits, 3>(x, m, rows, out, out_stride);
  dot_rows<Digits, 4>(x, m, rows, out, out_stride);
  if (tokens > 4) dot_few(x + 4, tokens - 4, m, rows, out + 4 * out_stride, out_stride);
}

// out[t][0..16) += block b of x[t] . the rows of a panel
template <int Digits, int Tokens>
[[gnu::noinline]] void multiply(const Panel& panel, const Block<Digits>* const* x, int b, float* out, int out_stride,
                                Prefetch& ahead) {
  const Block<Digits>* block[Tokens];
  __m512 total[Tokens];
  for (int t = 0; t < Tokens; t++) block[t] = x[t] + b, total[t] = _mm512_loadu_ps(out + t * out_stride);
  for (int g = 0; g < kGroups; g++) {
    if (ahead.due > 0) ahead.due--, ahead.next_block();  // a few at a time
    __m512i sum[Tokens];
    for (auto& s : sum) s = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int i = 0; i < 8 * Digits; i++) {
      const int digit = i / 8, part = i / 4 % 2, j = i % 4;
      const __m512i w = _mm512_load_si512(panel.q[g][i % 8]);
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; t++) {
        int four;
        __builtin_memcpy(&four, &block[t]->q[digit][g / 4][part][g % 4 * 16 + 4 * j], 4);
        if (i == 8) sum[t] = _mm512_slli_epi32(sum[t], 7);
        sum[t] = _mm512_dpbusd_epi32(sum[t], w, _mm512_set1_epi32(four));
      }
    }
    const __m512 scale = _mm512_load_ps(panel.scale[g]);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; t++) {
      const int at = g % 4 * 4 + g / 4;
      const __m512 d = _mm512_set1_ps(block[t]->d[at]), c = _mm512_set1_ps(block[t]->c[at]);
      total[t] = _mm512_fmadd_ps(_mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t]), d, c), scale, total[t]);
    }
  }
  for (int t = 0; t < Tokens; t++) _mm512_storeu_ps(out + t * out_stride, total[t]);
}

template <int Digits>
void dot_panels(const Block<Digits>* const* x, int tokens, const Matrix& m, int rows, float* out, int out_stride) {
  constexpr decltype(&multiply<Digits, 1>) kTiles[] = {multiply<Digits, 1>, multiply<Digits, 2>, multiply<Digits, 3>,
                                                       multiply<Digits, 4>, multiply<Digits, 5>, multiply<Digits, 6>,
                                                       multiply<Digits, 7>, multiply<Digits, 8>};
  for_each_panel(m, tokens, rows, out, out_stride, [&](const Panel& panel, int r, int b, Prefetch& ahead) {
    for (int t = 0; t < tokens; t += kPanelTokens) {
      const int some = tokens - t < kPanelTokens ? tokens - t : kPanelTokens;
      kTiles[some - 1](panel, x + t, b, out + t * out_stride + r, out_stride, ahead);
    }
  });
}

template <int Digits>
void dot_all(const void* const* rows_of_x, int tokens, const Matrix& m, int rows, float* out, int out_stride) {
  const auto* const* x = reinterpret_cast<const Block<Digits>* const*>(rows_of_x);
  const int panels = tokens > kFew ? rows / kPanelRows * kPanelRows : 0;
  if (panels) dot_panels(x, tokens, m, panels, out, out_stride);
  if (panels < rows) dot_few(x, tokens, m.skip(panels), rows - panels, out + panels, out_stride);
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
