// What the integer products of AVX-512 and of AMX share: x as bytes, in blocks of 512 inputs, and panels of INT4
// weights.
//
// 64 bytes of weights hold four groups, one in each 128-bit lane. Bytes of x come in the order in which the nibbles
// come when they are taken apart: the even inputs of four groups, then the odd ones. An int16 is two digits, 128 * high
// + low.
#pragma once
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

constexpr int kBlock = 512, kGroups = kBlock / 32, kBlockBytes = kBlock / 2;
constexpr int kPanelRows = 16, kStripRows = 64, kStripTokens = 16;
constexpr int kFew = 2;  // tokens for which a panel is not worth its making

// A block of a row of x.
template <int Digits>
struct Block {
  int8_t q[Digits][4][2][64];    // [high, low][128 inputs][even, odd]
  float d[kGroups], c[kGroups];  // of groups 0 4 8 12 1 5 9 13 ..., as lanes hold them; c = -8 d sum(q)
};

int blocks_of(int n) { return (n + kBlock - 1) / kBlock; }

__m128i load_quarter(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }

struct Matrix {
  const uint8_t* w;
  int64_t w_stride;
  const bf16* scale;
  int64_t scale_stride;
  int n;

  Matrix skip(int r) const { return {w + r * w_stride, w_stride, scale + r * scale_stride, scale_stride, n}; }
  const uint8_t* packed(int r, int b) const { return w + r * w_stride + b * kBlockBytes; }
  const bf16* scales(int r, int b) const { return scale + r * scale_stride + b * kGroups; }
};

// Asks for weights one group of rows ahead of their reading, as for AVX2.
struct Prefetch {
  const uint8_t *w, *scale;
  int blocks = 0;
  int due = 0;  // blocks of rows that have been read and not been replaced by others asked for

  Prefetch(const Matrix& m, int rows)
      : w(m.packed(rows, 0) + 4096), scale(reinterpret_cast<const uint8_t*>(m.scales(rows, 0)) + 512) {}

  void next_block() {
    for (int i = 0; i < kBlockBytes; i += 64) _mm_prefetch(w + i, _MM_HINT_T0);
    w += kBlockBytes;
    if (blocks++ % 2 == 0) _mm_prefetch(scale, _MM_HINT_T0), scale += 64;
  }
};

// A block that the end of the row cuts off, filled up with zeros.
struct LastBlock {
  uint8_t w[kBlockBytes] = {};
  bf16 scale[kGroups] = {};

  void load(const Matrix& m, int r, int b) {
    const int groups = m.n / 32 - b * kGroups;
    __builtin_memcpy(w, m.packed(r, b), groups * 16), __builtin_memcpy(scale, m.scales(r, b), groups * sizeof(bf16));
  }
};

// Double word j of 16 bytes of each of 16 rows.
void transpose(const void* const* rows, int at, __m512i (&words)[4]) {
  __m512i v[4], u[4];
  for (int r = 0; r < 4; r++) {
    const auto row = [&](int i) { return load_quarter(static_cast<const uint8_t*>(rows[r + i]) + at); };
    v[r] = _mm512_inserti32x4(_mm512_castsi128_si512(row(0)), row(4), 1);
    v[r] = _mm512_inserti32x4(_mm512_inserti32x4(v[r], row(8), 2), row(12), 3);
  }
  for (int r = 0; r < 2; r++) {
    u[r] = _mm512_unpacklo_epi32(v[2 * r], v[2 * r + 1]);
    u[r + 2] = _mm512_unpackhi_epi32(v[2 * r], v[2 * r + 1]);
  }
  for (int j = 0; j < 2; j++) {
    words[2 * j] = _mm512_unpacklo_epi64(u[2 * j], u[2 * j + 1]);
    words[2 * j + 1] = _mm512_unpackhi_epi64(u[2 * j], u[2 * j + 1]);
  }
}

void unpack(__m512i w, __m512i (&parts)[2]) {
  const __m512i nibble = _mm512_set1_epi8(15);
  parts[0] = _mm512_and_si512(w, nibble), parts[1] = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);
}

// 16 rows of a block of weights, taken apart; lane r of each vector belongs to row r.
struct Panel {
  alignas(64) uint8_t q[kGroups][8][kPanelRows][4];  // [group][even inputs by four, then odd ones]
  float scale[kGroups][kPanelRows];

  // w[r] and s[r] are where row r has its block.
  void fill(const void* const* w, const void* const* s) {
    __m512i words[4];
    for (int g = 0; g < kGroups; g++) {
      transpose(w, 16 * g, words);
      for (int j = 0; j < 4; j++) {
        __m512i part[2];
        unpack(words[j], part);
        _mm512_store_si512(q[g][j], part[0]), _mm512_store_si512(q[g][4 + j], part[1]);
      }
    }
    for (int half = 0; half < 2; half++) {
      transpose(s, 16 * half, words);
      for (int j = 0; j < 4; j++) {  // a double word is the scales of two groups
        const __m512i odd = _mm512_and_si512(words[j], _mm512_set1_epi32(int(0xffff0000)));
        _mm512_store_si512(scale[8 * half + 2 * j], _mm512_slli_epi32(words[j], 16));
        _mm512_store_si512(scale[8 * half + 2 * j + 1], odd);
      }
    }
  }

  // Block b of rows [r, r + 16)
  void load_rows(const Matrix& m, int r, int b) {
    const void *w[kPanelRows], *s[kPanelRows];
    for (int i = 0; i < kPanelRows; i++) w[i] = m.packed(r + i, b), s[i] = m.scales(r + i, b);
    if (b < m.n / kBlock) return fill(w, s);
    LastBlock last[kPanelRows];
    for (int i = 0; i < kPanelRows; i++) last[i].load(m, r + i, b), w[i] = last[i].w, s[i] = last[i].scale;
    fill(w, s);
  }
};

// Zeroes out [tokens][rows] and calls multiply(panel, row, block, prefetch) for all panels: a strip of rows at a time,
// block after block. As for AVX2, a strip has four panels or, for fewer tokens, one.
template <class Multiply>
void for_each_panel(const Matrix& m, int tokens, int rows, float* out, int out_stride, Multiply&& multiply) {
  Panel panel;
  for (int t = 0; t < tokens; t++) __builtin_memset(out + t * out_stride, 0, rows * sizeof(float));
  const int strip = tokens <= kStripTokens ? kPanelRows : kStripRows;
  Prefetch ahead(m, strip);
  for (int first = 0; first < rows; first += strip)
    for (int b = 0; b < blocks_of(m.n); b++)
      for (int r = first; r < rows && r < first + strip; r += kPanelRows) {
        panel.load_rows(m, r, b);
        ahead.due += kPanelRows;
        multiply(panel, r, b, ahead);
      }
}

}  // namespace
}  // namespace kimi::cpu
