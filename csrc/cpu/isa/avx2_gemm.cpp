// Products with bf16 and INT4 weights in float32, for AVX2 + FMA.
#include <immintrin.h>

#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

constexpr int kTileTokens = 6;  // by kStrip weight rows: 12 sums, two vectors of weights and one of x in 16 registers
// Where weights are read from memory: tokens that share them in registers, rows whose sums are kept at a time, inputs
// of all tokens of a tile together, which stay in the L1 cache, and bytes or rows that are asked for ahead.
constexpr int kFewTile = 4, kFewRows = 64, kFewInputs = 8192, kAheadBytes = 2048, kAheadRows = 2;
constexpr int kFewColumns = 512, kAheadTransposed = 4;  // of a transposed weight: sums kept, rows asked for ahead

int least(int a, int b) { return a < b ? a : b; }

float sum_lanes(__m256 v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}

// bf16 as float32, of the even ones and of the odd ones.
__m256i even_halves(__m256i v) { return _mm256_slli_epi32(v, 16); }
__m256i odd_halves(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi32(int(0xffff0000))); }
__m256 load_bf16(const bf16* p) {
  return _mm256_castsi256_ps(even_halves(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
}

void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0); }
void prefetch_l2(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T1); }

// A piece of a product with a few tokens: n inputs of rows that have `all`. Sums go on from piece to piece in eight
// lanes, so their order does not depend on the pieces, which depend on the tokens.
struct Piece {
  int n, all;

  static int inputs(int tokens) { return tokens == 1 ? kFewInputs : tokens == 2 ? kFewInputs / 4 : kFewInputs / 8; }

  // The way from row r of `rows` to what is to be asked for meanwhile: further on in a whole row, or else the same
  // piece some rows on, or the next piece of one of the first. stride, piece: of a row and of a full piece.
  int64_t ahead(int r, int rows, int64_t stride, int64_t piece, int64_t further) const {
    if (n == all) return further;
    return r + kAheadRows < rows ? kAheadRows * stride : piece + (kAheadRows - rows) * stride;
  }
};

using Lanes = float[kFewRows][8];  // of each token

// out[t * out_stride + r] = the sum of lanes
void sum_up(const Lanes* lanes, int tokens, int rows, float* out, int out_stride) {
  for (int t = 0; t < tokens; t++)
    for (int r = 0; r < rows; r++) out[t * out_stride + r] = sum_lanes(_mm256_load_ps(lanes[t][r]));
}

// lanes[t][r * step] += x[t] . w[r * step] for r < kRows, n a multiple of 8. Lane j holds the inputs k = j mod 8.
template <int kTokens, int kRows>
void add_few_bf16(const float* const* x, const bf16* w, int64_t stride, int64_t ahead, int n, Lanes* lanes, int row,
                  int step) {
  __m256 sum[kTokens][kRows];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; t++)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) sum[t][r] = _mm256_load_ps(lanes[t][row + r * step]);
  for (int i = 0; i < n; i += 8) {
    if (i % 32 == 0)
      for (int r = 0; r < kRows; r++) prefetch(w + r * stride + i + ahead);
    __m256 weight[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) weight[r] = load_bf16(w + r * stride + i);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; t++) {
      const __m256 value = _mm256_loadu_ps(x[t] + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) sum[t][r] = _mm256_fmadd_ps(value, weight[r], sum[t][r]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; t++)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) _mm256_store_ps(lanes[t][row + r * step], sum[t][r]);
}

// Rows in kRows runs of consecutive ones, read side by side.
template <int kTokens, int kRows>
void add_runs(const float* const* x, const bf16* w, int64_t stride, int rows, const Piece& p, Lanes* lanes) {
  const int step = rows / kRows, piece = Piece::inputs(kTokens);
  for (int r = 0; r < step; r++)
    add_few_bf16<kTokens, kRows>(x, w + r * stride, step * stride, p.ahead(r, step, stride, piece, kAheadBytes / 2),
                                 p.n, lanes, r, step);
  for (int r = step * kRows; r < rows; r++) add_few_bf16<kTokens, 1>(x, w + r * stride, 0, stride, p.n, lanes, r, 1);
}

void few_bf16(const float* const* x, int tokens, const bf16* w, int64_t w_stride, int rows, int n, float* out,
              int out_stride) {
  constexpr decltype(&add_runs<1, 4>) kRuns[] = {add_runs<1, 4>, add_runs<2, 4>, add_runs<3, 4>, add_runs<4, 3>};
  const int whole = n / 8 * 8;
  for (int t = 0; t < tokens; t += kFewTile)
    for (int row = 0; row < rows; row += kFewRows) {
      const int some = least(kFewTile, tokens - t), height = least(kFewRows, rows - row), inputs = Piece::inputs(some);
      alignas(32) Lanes lanes[kFewTile] = {};
      for (int begin = 0; begin < whole; begin += inputs) {
        const float* xs[kFewTile];
        for (int j = 0; j < some; j++) xs[j] = x[t + j] + begin;
        kRuns[some - 1](xs, w + row * w_stride + begin, w_stride, height, {least(inputs, whole - begin), whole}, lanes);
      }
      sum_up(lanes, some, height, out + t * out_stride + row, out_stride);
    }
  for (int t = 0; t < tokens; t++)
    for (int r = 0; r < rows; r++)
      for (int i = whole; i < n; i++) out[t * out_stride + r] += x[t][i] * to_float(w[r * w_stride + i]);
}

// Of each token. Padded: stores a multiple of 4 KiB before a load would hold it up.
using ColumnSums = float[kFewColumns + kStrip];

// sums[t][c] += sum_r x[t][r] * w[r][c] for r < kRows, c < columns, r ascending
template <int kTokens, int kRows>
void add_rows(const float* const* x, const bf16* w, int64_t stride, int columns, ColumnSums* sums) {
  __m256 value[kTokens][kRows];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; t++)
#pragma GCC unroll 2
    for (int r = 0; r < kRows; r++) value[t][r] = _mm256_broadcast_ss(x[t] + r);
  const auto add = [&](int c) {
    __m256 sum[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; t++) sum[t] = _mm256_load_ps(sums[t] + c);
#pragma GCC unroll 2
    for (int r = 0; r < kRows; r++) {
      const __m256 weight = load_bf16(w + r * stride + c);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; t++) sum[t] = _mm256_fmadd_ps(value[t][r], weight, sum[t]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; t++) _mm256_store_ps(sums[t] + c, sum[t]);
  };
  int c = 0;
  for (; c + 32 <= columns; c += 32) {
    for (int r = 0; r < kRows; r++) prefetch(w + (r + kAheadTransposed) * stride + c);
#pragma GCC unroll 4
    for (int j = 0; j < 32; j += 8) add(c + j);
  }
  for (; c + 8 <= columns; c += 8) add(c);
  for (; c < columns; c++)
    for (int t = 0; t < kTokens; t++)
      for (int r = 0; r < kRows; r++) sums[t][c] += x[t][r] * to_float(w[r * stride + c]);
}

// One or two tokens read row after row, in the order of memory. More take two rows at a time.
template <int kTokens>
void add_transposed(const float* const* x, const bf16* w, int64_t stride, int columns, int n, ColumnSums* sums) {
  constexpr int kRows = kTokens <= 2 ? 1 : 2;
  const float* xs[kTokens];
  int i = 0;
  const auto at = [&] {
    for (int t = 0; t < kTokens; t++) xs[t] = x[t] + i;
    return xs;
  };
  for (; i + kRows <= n; i += kRows) add_rows<kTokens, kRows>(at(), w + i * stride, stride, columns, sums);
  if (i < n) add_rows<kTokens, 1>(at(), w + i * stride, stride, columns, sums);
}

void few_bf16_transposed(const float* const* x, int tokens, const bf16* w, int64_t w_stride, int columns, int n,
                         float* out, int64_t out_stride) {
  constexpr decltype(&add_transposed<1>) kAdd[] = {add_transposed<1>, add_transposed<2>, add_transposed<3>,
                                                   add_transposed<4>};
  for (int t = 0; t < tokens; t += kFewTile)
    for (int c = 0; c < columns; c += kFewColumns) {
      const int some = least(kFewTile, tokens - t), width = least(kFewColumns, columns - c);
      alignas(32) ColumnSums sums[kFewTile] = {};
      kAdd[some - 1](x + t, w + c, w_stride, width, n, sums);
      for (int j = 0; j < some; j++) __builtin_memcpy(out + (t + j) * out_stride + c, sums[j], width * sizeof(float));
    }
}

__m256i table(int64_t first, int64_t last) { return _mm256_setr_epi64x(first, last, first, last); }

// 32 weights without their scale, and the order in which they come out.
struct Int4 {
  static constexpr int kGroupBytes = 16;

  // 0 4 8 12 1 5 9 13, 2 6 10 14 3 7 11 15
  static void put_in_order(const float* x, int n, float* ordered) {
    for (int i = 0; i < n; i += 16) {
      __m128 v[4];
      for (int j = 0; j < 4; j++) v[j] = _mm_loadu_ps(x + i + 4 * j);
      _MM_TRANSPOSE4_PS(v[0], v[1], v[2], v[3]);
      for (int j = 0; j < 4; j++) _mm_store_ps(ordered + i + 4 * j, v[j]);
    }
  }

  // The low lane has the even inputs, which are the low nibbles, the high lane the odd ones. Two tables give the two
  // bytes of q as bf16.
  static void decode(const uint8_t* packed, __m256 out[4]) {
    const __m256i high = table(int64_t(0xbfc0c0c0c0c0c0c1), 0x4040404040403f00);
    const __m256i low = table(int64_t(0x80004080a0c0e000), int64_t(0xe0c0a08040008000));
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    const __m256i nibbles =
        _mm256_and_si256(_mm256_srlv_epi32(bytes, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)), _mm256_set1_epi8(15));
    const __m256i a = _mm256_shuffle_epi8(low, nibbles), b = _mm256_shuffle_epi8(high, nibbles);
    const __m256i first = _mm256_unpacklo_epi8(a, b), last = _mm256_unpackhi_epi8(a, b);
    out[0] = _mm256_castsi256_ps(even_halves(first)), out[1] = _mm256_castsi256_ps(odd_halves(first));
    out[2] = _mm256_castsi256_ps(even_halves(last)), out[3] = _mm256_castsi256_ps(odd_halves(last));
  }
};

// lanes[t][row] += x[t] . w, x in order. A group is summed before it is scaled.
template <int kTokens>
void add_few_int4(const float* const* x, const uint8_t* w, int64_t ahead, const bf16* scale, int64_t scale_ahead,
                  int groups, Lanes* lanes, int row) {
  __m256 sum[kTokens];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; t++) sum[t] = _mm256_load_ps(lanes[t][row]);
  const auto add_group = [&](int g, __m256i s) {
    __m256 q[4];
    Int4::decode(w + Int4::kGroupBytes * g, q);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; t++) {
      const float* xs = x[t] + 32 * g;
      __m256 part = _mm256_mul_ps(_mm256_load_ps(xs), q[0]);
      for (int j = 1; j < 4; j++) part = _mm256_fmadd_ps(_mm256_load_ps(xs + 8 * j), q[j], part);
      sum[t] = _mm256_fmadd_ps(part, _mm256_castsi256_ps(s), sum[t]);
    }
  };
  int g = 0;
  for (; g + 4 <= groups; g += 4) {
    for (int i = 0; i < 4 * Int4::kGroupBytes; i += 64) prefetch(w + Int4::kGroupBytes * g + i + ahead);
    if (g % 32 == 0) prefetch(scale + g + scale_ahead);
    for (int j = g; j < g + 4; j += 2) {
      int pair;
      __builtin_memcpy(&pair, scale + j, 4);
      const __m256i s = _mm256_set1_epi32(pair);
      add_group(j, even_halves(s));
      add_group(j + 1, odd_halves(s));
    }
  }
  for (; g < groups; g++) add_group(g, _mm256_set1_epi32(int(unsigned(scale[g].bits) << 16)));
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; t++) _mm256_store_ps(lanes[t][row], sum[t]);
}

void few_int4(const float* const* x, int tokens, const uint8_t* w, int64_t w_stride, const bf16* scale,
              int64_t scale_stride, int rows, int n, float* out, int out_stride) {
  constexpr decltype(&add_few_int4<1>) kAdd[] = {add_few_int4<1>, add_few_int4<2>, add_few_int4<3>, add_few_int4<4>};
  constexpr int kBytes = Int4::kGroupBytes;
  alignas(64) float ordered[kFewInputs];
  for (int t = 0; t < tokens; t += kFewTile)
    for (int row = 0; row < rows; row += kFewRows) {
      const int some = least(kFewTile, tokens - t), height = least(kFewRows, rows - row), inputs = Piece::inputs(some);
      alignas(32) Lanes lanes[kFewTile] = {};
      for (int begin = 0; begin < n; begin += inputs) {
        const Piece p{least(inputs, n - begin), n};
        const float* xs[kFewTile];
        for (int j = 0; j < some; j++) {
          Int4::put_in_order(x[t + j] + begin, p.n, ordered + j * inputs);
          xs[j] = ordered + j * inputs;
        }
        const int g = begin / 32, groups = inputs / 32;
        for (int r = 0; r < height; r++)
          kAdd[some - 1](xs, w + (row + r) * w_stride + g * kBytes,
                         p.ahead(r, height, w_stride, groups * kBytes, kAheadBytes),
                         scale + (row + r) * scale_stride + g,
                         p.ahead(r, height, scale_stride, groups, kAheadBytes / kBytes), p.n / 32, lanes, r);
      }
      sum_up(lanes, some, height, out + t * out_stride + row, out_stride);
    }
}

// The row that lane j of a strip has, or the last one where there is none.
int row_of(int j, int rows) { return j < rows ? j : rows - 1; }

void widen_pair(__m256i v, float* out) {  // 16 bf16, 4 rows of each half in turn: [0-3, 8-11 | 4-7, 12-15]
  const __m256i zero = _mm256_setzero_si256();
  _mm256_store_ps(out, _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, v)));
  _mm256_store_ps(out + 8, _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, v)));
}

// 8 inputs of a strip: a transpose of 16 rows of 8.
void pack_eight(const bf16* w, int64_t stride, float* panel) {
  __m256i v[8], u[8];
  for (int j = 0; j < 8; j++) {
    const bf16* at = w + (j < 4 ? j : j + 4) * stride;
    v[j] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))),
                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 4 * stride)), 1);
  }
  for (int j = 0; j < 4; j++) {                                // pairs of rows
    u[j] = _mm256_unpacklo_epi16(v[2 * j], v[2 * j + 1]);      // inputs 0-3
    u[4 + j] = _mm256_unpackhi_epi16(v[2 * j], v[2 * j + 1]);  // inputs 4-7
  }
  for (int h = 0; h < 2; h++)
    for (int j = 0; j < 2; j++) {                                                        // fours of rows
      v[4 * h + j] = _mm256_unpacklo_epi32(u[4 * h + 2 * j], u[4 * h + 2 * j + 1]);      // inputs 0, 1
      v[4 * h + 2 + j] = _mm256_unpackhi_epi32(u[4 * h + 2 * j], u[4 * h + 2 * j + 1]);  // inputs 2, 3
    }
  for (int p = 0; p < 4; p++) {
    widen_pair(_mm256_unpacklo_epi64(v[2 * p], v[2 * p + 1]), panel + 2 * p * kStrip);
    widen_pair(_mm256_unpackhi_epi64(v[2 * p], v[2 * p + 1]), panel + (2 * p + 1) * kStrip);
  }
}

void pack_bf16(const bf16* w, int64_t w_stride, int64_t ahead, int rows, int n, float* panel) {
  int k = 0;
  if (rows == kStrip)
    for (; k + 8 <= n; k += 8) {
      if (k % 32 == 0)
        for (int j = 0; j < kStrip; j++) prefetch_l2(w + j * w_stride + k + ahead);
      pack_eight(w + k, w_stride, panel + k * kStrip);
    }
  for (; k < n; k++)
    for (int j = 0; j < kStrip; j++) panel[k * kStrip + j] = to_float(w[row_of(j, rows) * w_stride + k]);
}

void pack_bf16_transposed(const bf16* w, int64_t w_stride, int rows, int n, float* panel) {
  for (int i = 0; i < n; i++) {
    const bf16* at = w + i * w_stride;
    prefetch(at + 16 * w_stride), prefetch(at + 2 * kStrip);  // rows further down, and the strip after the next
    if (rows == kStrip) {
      _mm256_store_ps(panel + i * kStrip, load_bf16(at));
      _mm256_store_ps(panel + i * kStrip + 8, load_bf16(at + 8));
    } else {
      for (int j = 0; j < kStrip; j++) panel[i * kStrip + j] = to_float(at[row_of(j, rows)]);
    }
  }
}

// One word of eight rows: eight inputs of each. q * scale is exact in float32.
template <int kField = 0>
void pack_words(__m256i words, __m256 scale, float* panel) {
  if constexpr (kField < 8) {
    const __m256i q = _mm256_srai_epi32(_mm256_slli_epi32(words, 28 - 4 * kField), 28);
    _mm256_store_ps(panel + kField * kStrip, _mm256_mul_ps(_mm256_cvtepi32_ps(q), scale));
    pack_words<kField + 1>(words, scale, panel);
  }
}

// A group of eight rows from the one at `first`. XORed with the sign bits the nibbles are in two's complement.
void pack_group(const uint8_t* w, int64_t w_stride, int first, int rows, __m256 scale, float* panel) {
  constexpr int kWord = 8 * kStrip;  // floats of the panel
  __m256i v[4];
  for (int j = 0; j < 4; j++) {
    const auto at = [&](int r) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + row_of(first + r, rows) * w_stride));
    };
    v[j] = _mm256_xor_si256(_mm256_inserti128_si256(_mm256_castsi128_si256(at(j)), at(j + 4), 1),
                            _mm256_set1_epi32(int(0x88888888)));
  }
  const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpacklo_epi32(v[2], v[3]);
  const __m256i c = _mm256_unpackhi_epi32(v[0], v[1]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  pack_words(_mm256_unpacklo_epi64(a, b), scale, panel);
  pack_words(_mm256_unpackhi_epi64(a, b), scale, panel + kWord);
  pack_words(_mm256_unpacklo_epi64(c, d), scale, panel + 2 * kWord);
  pack_words(_mm256_unpackhi_epi64(c, d), scale, panel + 3 * kWord);
}

void pack_int4(const uint8_t* w, int64_t w_stride, int64_t ahead, const bf16* scale, int64_t scale_stride, int rows,
               int n, float* panel) {
  constexpr int kGroupBytes = 16;
  for (int g = 0; g < n / 32; g++, w += kGroupBytes, panel += 32 * kStrip) {
    if (g * kGroupBytes % 64 == 0)
      for (int j = 0; j < rows; j++) prefetch_l2(w + j * w_stride + ahead);
    for (int first = 0; first < kStrip; first += 8) {
      alignas(32) uint32_t bits[8];
      for (int j = 0; j < 8; j++) bits[j] = uint32_t(scale[row_of(first + j, rows) * scale_stride + g].bits) << 16;
      const __m256 s = _mm256_castsi256_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(bits)));
      pack_group(w, w_stride, first, rows, s, panel + first);
    }
  }
}

template <int kTokens>
void multiply_tile(const float* x, int64_t x_stride, const float* panel, int n, float* sums, int64_t sums_stride) {
  // Every loop over tokens is unrolled: one that is not would keep the sums in memory.
  __m256 a[kTokens], b[kTokens];
#pragma GCC unroll 6
  for (int t = 0; t < kTokens; t++) a[t] = b[t] = _mm256_setzero_ps();
  for (int i = 0; i < n; i++) {
    const __m256 u = _mm256_load_ps(panel + i * kStrip), v = _mm256_load_ps(panel + i * kStrip + 8);
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; t++) {
      const __m256 value = _mm256_broadcast_ss(x + t * x_stride + i);
      a[t] = _mm256_fmadd_ps(value, u, a[t]);
      b[t] = _mm256_fmadd_ps(value, v, b[t]);
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < kTokens; t++) {
    float* to = sums + t * sums_stride;
    _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), a[t]));
    _mm256_storeu_ps(to + 8, _mm256_add_ps(_mm256_loadu_ps(to + 8), b[t]));
  }
}

// Tiles of almost equal numbers of tokens: one alone would wait for each product.
void multiply(const float* x, int64_t x_stride, int tokens, const float* panel, int n, float* sums,
              int64_t sums_stride) {
  constexpr decltype(&multiply_tile<1>) kTiles[] = {multiply_tile<1>, multiply_tile<2>, multiply_tile<3>,
                                                    multiply_tile<4>, multiply_tile<5>, multiply_tile<6>};
  const int tiles = (tokens + kTileTokens - 1) / kTileTokens;
  for (int i = 0; i < tiles; i++) {
    const int t = tokens * i / tiles, end = tokens * (i + 1) / tiles;
    kTiles[end - t - 1](x + t * x_stride, x_stride, panel, n, sums + t * sums_stride, sums_stride);
  }
}

}  // namespace

const GemmKernels avx2_gemm_kernels = {
    .few_bf16 = few_bf16,
    .few_int4 = few_int4,
    .few_bf16_transposed = few_bf16_transposed,
    .pack_bf16 = pack_bf16,
    .pack_bf16_transposed = pack_bf16_transposed,
    .pack_int4 = pack_int4,
    .multiply = multiply,
};

}  // namespace kimi::cpu
