// Integer products for AVX2, of weights as they lie in memory. Nibbles q + 8 enter unsigned, and 8 d * sum(x) of each
// group is taken off again.
//
// Inputs go in blocks of 256, eight groups: 32 bytes of weights hold two groups, one in each 128-bit lane. With bytes
// of x (`vpmaddubsw`) the nibbles are taken apart into bytes, even inputs and odd ones; with int16 (`vpmaddwd`) into
// words, inputs by their remainder of 4. x is stored in the order that gives, so one load of it meets one part of the
// weights.
//
// Few tokens multiply 32 bytes of a row at a time and scale the sums of each group, four to a lane, where they are.
// More tokens share a panel of 16 rows, transposed so that each lane belongs to a row: sums then need no bringing
// together.
#include <immintrin.h>

#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

constexpr int kBlock = 256, kGroups = kBlock / 32, kBlockBytes = kBlock / 2;
constexpr int kPanelRows = 16, kPanelTokens = 4, kStripRows = 64, kStripTokens = 16;

// A block of a row of x. With two digits, q holds int16.
template <int Digits>
struct Block {
  static constexpr int kParts = 2 * Digits;
  int8_t q[4][kParts][32];       // [64 inputs][part]
  float d[kGroups], c[kGroups];  // of groups 0 2 4 6 1 3 5 7, as lanes hold them; c = -8 d sum(q)
};

int blocks_of(int n) { return (n + kBlock - 1) / kBlock; }

size_t row_bytes(int n, int digits) { return blocks_of(n) * (digits == 1 ? sizeof(Block<1>) : sizeof(Block<2>)); }

__m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
__m128i load_half(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }
void store_half(void* at, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(at), v); }

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

// 32 integers to the half of each part of a block that begins at `half`.
void store_group(const __m256i (&v)[4], int8_t (&q)[2][32], int half) {
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
  const __m256i ordered = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m256i split =
      _mm256_shuffle_epi8(ordered, _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8,
                                                    10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  const __m256i parts = _mm256_permute4x64_epi64(split, 0xd8);
  store_half(q[0] + half, _mm256_castsi256_si128(parts)), store_half(q[1] + half, _mm256_extracti128_si256(parts, 1));
}

void store_group(const __m256i (&v)[4], int8_t (&q)[4][32], int half) {
  __m128i first[2], second[2];  // parts 0 and 1, parts 2 and 3 of 16 inputs each
  for (int i = 0; i < 2; i++) {
    const __m256i packed = _mm256_packs_epi32(v[2 * i], v[2 * i + 1]);  // inputs 0-3 8-11 | 4-7 12-15
    const __m256i pairs = _mm256_shuffle_epi8(                          // 0 8 1 9 2 10 3 11 | 4 12 5 13 6 14 7 15
        packed, _mm256_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15, 0, 1, 8, 9, 2, 3, 10, 11, 4, 5,
                                 12, 13, 6, 7, 14, 15));
    const __m128i low = _mm256_castsi256_si128(pairs), high = _mm256_extracti128_si256(pairs, 1);
    first[i] = _mm_unpacklo_epi16(low, high), second[i] = _mm_unpackhi_epi16(low, high);
  }
  store_half(q[0] + half, _mm_unpacklo_epi64(first[0], first[1]));
  store_half(q[1] + half, _mm_unpackhi_epi64(first[0], first[1]));
  store_half(q[2] + half, _mm_unpacklo_epi64(second[0], second[1]));
  store_half(q[3] + half, _mm_unpackhi_epi64(second[0], second[1]));
}

// Group g of a block: x = d * q.
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
  store_group(q, block.q[g / 2], g % 2 * 16);
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

// What one and two digits do differently.
template <int Digits>
struct Integers;

template <>
struct Integers<1> {
  static void unpack(__m256i w, __m256i (&parts)[2]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    parts[0] = _mm256_and_si256(w, nibble), parts[1] = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble);
  }
  static __m256i multiply(__m256i w, __m256i x) { return _mm256_maddubs_epi16(w, x); }
  static __m256i add(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }  // 16 products of 15 * 127 fit
  static __m256i to_int32(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
};

template <>
struct Integers<2> {
  static void unpack(__m256i w, __m256i (&parts)[4]) {
    const __m256i nibble = _mm256_set1_epi16(15);
    parts[0] = _mm256_and_si256(w, nibble), parts[1] = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble);
    parts[2] = _mm256_and_si256(_mm256_srli_epi16(w, 8), nibble), parts[3] = _mm256_srli_epi16(w, 12);
  }
  static __m256i multiply(__m256i w, __m256i x) { return _mm256_madd_epi16(w, x); }
  static __m256i add(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }
  static __m256i to_int32(__m256i sum) { return sum; }
};

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

// Asks for blocks of weight rows before they are read, and for their scales.
struct Prefetch {
  const uint8_t* w;
  const bf16* scale;
  int64_t w_step, scale_step;
  int due = 0;  // blocks that may be asked for

  // One group of rows ahead of their reading. The rows of a group lie one after the other, so whatever the order within
  // a group is, memory is read from front to back.
  static Prefetch group_ahead(const Matrix& m, int rows) {
    return {m.packed(rows, 0) + 4096, m.scales(rows, 0) + 256, kBlockBytes, kGroups};
  }
  // Block b of the rows from r on.
  static Prefetch block_of_rows(const Matrix& m, int r, int b) {
    return {m.packed(r, b), m.scales(r, b), m.w_stride, m.scale_stride};
  }

  void next_block() {
    // The last bytes, as matrices begin anywhere in a cache line: the first belong to the line of the block before.
    _mm_prefetch(w + 63, _MM_HINT_T0), _mm_prefetch(w + 127, _MM_HINT_T0), _mm_prefetch(scale + 7, _MM_HINT_T0);
    w += w_step, scale += scale_step;
  }
};

// A block that the end of the row cuts off, filled up with zeros.
struct LastBlock {
  uint8_t w[kBlockBytes] = {};
  bf16 scale[kGroups] = {};

  LastBlock(const Matrix& m, int r, int b) {
    const int groups = m.n / 32 - b * kGroups;
    __builtin_memcpy(w, m.packed(r, b), groups * 16), __builtin_memcpy(scale, m.scales(r, b), groups * sizeof(bf16));
  }
};

float sum_lanes(__m256 v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}

// Adds the products of 64 inputs, J of 4, to sum. scale holds weight scale * d.
template <int Digits, int Tokens, int J>
[[gnu::always_inline]] inline void add_pair(const uint8_t* w, const Block<Digits>* const* x, int b,
                                            const __m256 (&scale)[Tokens], __m256 (&sum)[Tokens]) {
  using I = Integers<Digits>;
  __m256i part[2 * Digits];
  I::unpack(load(w + 32 * J), part);
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; t++) {
    const auto& q = x[t][b].q[J];
    __m256i p = I::add(I::multiply(part[0], load(q[0])), I::multiply(part[1], load(q[1])));
    if constexpr (Digits == 2)
      p = I::add(p, I::add(I::multiply(part[2], load(q[2])), I::multiply(part[3], load(q[3]))));
    sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(I::to_int32(p)), _mm256_permute_ps(scale[t], J * 0x55), sum[t]);
  }
}

// sum[t] += block b of x[t] . a block of weights
template <int Digits, int Tokens>
[[gnu::always_inline]] inline void add_block(const uint8_t* w, const bf16* scales, const Block<Digits>* const* x, int b,
                                             __m256 (&sum)[Tokens]) {
  const __m256i order = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 4, 5, -1, -1, 8, 9, -1, -1, 12, 13,  //
                                         -1, -1, 2, 3, -1, -1, 6, 7, -1, -1, 10, 11, -1, -1, 14, 15);
  const __m256 scale =  // of groups 0 2 4 6 1 3 5 7
      _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_half(scales)), order));
  __m256 scaled[Tokens], odd[Tokens];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; t++) {
    scaled[t] = _mm256_mul_ps(scale, _mm256_loadu_ps(x[t][b].d));
    sum[t] = _mm256_fmadd_ps(scale, _mm256_loadu_ps(x[t][b].c), sum[t]);
    odd[t] = _mm256_setzero_ps();  // two chains of additions: with one, a single token waits for them
  }
  add_pair<Digits, Tokens, 0>(w, x, b, scaled, sum), add_pair<Digits, Tokens, 1>(w, x, b, scaled, odd);
  add_pair<Digits, Tokens, 2>(w, x, b, scaled, sum), add_pair<Digits, Tokens, 3>(w, x, b, scaled, odd);
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; t++) sum[t] = _mm256_add_ps(sum[t], odd[t]);
}

// A few rows at a time, so that blocks of several tokens stay in the L1 cache; one token reads row after row.
template <int Digits, int Tokens>
void dot_rows(const Block<Digits>* const* x, const Matrix& m, int rows, float* out, int out_stride) {
  constexpr int kRows = Tokens == 1 ? 1 : 4;
  const int whole = m.n / kBlock, blocks = blocks_of(m.n);
  auto ahead = Prefetch::group_ahead(m, kRows);
  for (int first = 0; first < rows; first += kRows) {
    const int few = rows - first < kRows ? rows - first : kRows;
    __m256 sum[kRows][Tokens];
    for (auto& row : sum)
      for (auto& s : row) s = _mm256_setzero_ps();
    for (int b = 0; b < whole; b++)
      for (int r = 0; r < few; r++) {
        ahead.next_block();
        add_block<Digits, Tokens>(m.packed(first + r, b), m.scales(first + r, b), x, b, sum[r]);
      }
    if (whole < blocks)
      for (int r = 0; r < few; r++) {
        const LastBlock last(m, first + r, whole);
        add_block<Digits, Tokens>(last.w, last.scale, x, whole, sum[r]);
      }
    for (int r = 0; r < few; r++)
      for (int t = 0; t < Tokens; t++) out[t * out_stride + first + r] = sum_lanes(sum[r][t]);
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

// 16 rows of a block of weights, taken apart, lane r of each pair of vectors belongs to row r.
template <int Digits>
struct Panel {
  uint8_t q[kGroups][4][2 * Digits][2][32];  // [group][8 inputs][part][rows]: 4 bytes a row, of 4 or 2 inputs
  float scale[kGroups][2][8];

  // Eight rows from w and s on.
  void fill(const uint8_t* w, int64_t w_stride, const bf16* s, int64_t s_stride, int half) {
    const auto packed = [&](int r, int i) { return load_half(w + r * w_stride + 16 * i); };
    const auto scales = [&](int r) { return load_half(s + r * s_stride); };
    for (int i = 0; i < kGroups; i++) {  // the 16 bytes of a group in each row
      __m256i v[4], u[4];
      for (int r = 0; r < 4; r++) v[r] = _mm256_set_m128i(packed(r + 4, i), packed(r, i));
      for (int r = 0; r < 2; r++) {
        u[r] = _mm256_unpacklo_epi32(v[2 * r], v[2 * r + 1]);
        u[r + 2] = _mm256_unpackhi_epi32(v[2 * r], v[2 * r + 1]);
      }
      for (int j = 0; j < 2; j++) {
        v[2 * j] = _mm256_unpacklo_epi64(u[2 * j], u[2 * j + 1]);
        v[2 * j + 1] = _mm256_unpackhi_epi64(u[2 * j], u[2 * j + 1]);
      }
      for (int j = 0; j < 4; j++) {
        __m256i part[2 * Digits];
        Integers<Digits>::unpack(v[j], part);
        for (int p = 0; p < 2 * Digits; p++) _mm256_store_si256(reinterpret_cast<__m256i*>(q[i][j][p][half]), part[p]);
      }
    }
    __m256i v[4], u[4];
    for (int r = 0; r < 4; r++) v[r] = _mm256_set_m128i(scales(r + 4), scales(r));
    for (int r = 0; r < 2; r++) {
      u[r] = _mm256_unpacklo_epi16(v[2 * r], v[2 * r + 1]);
      u[r + 2] = _mm256_unpackhi_epi16(v[2 * r], v[2 * r + 1]);
    }
    for (int j = 0; j < 2; j++) {
      v[2 * j] = _mm256_unpacklo_epi32(u[2 * j], u[2 * j + 1]);
      v[2 * j + 1] = _mm256_unpackhi_epi32(u[2 * j], u[2 * j + 1]);
    }
    const __m256i zero = _mm256_setzero_si256();
    for (int j = 0; j < 4; j++) {
      _mm256_store_ps(scale[2 * j][half], _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, v[j])));
      _mm256_store_ps(scale[2 * j + 1][half], _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, v[j])));
    }
  }

  // Block b of rows [r, r + 16)
  void load_rows(const Matrix& m, int r, int b) {
    fill(m.packed(r, b), m.w_stride, m.scales(r, b), m.scale_stride, 0);
    fill(m.packed(r + 8, b), m.w_stride, m.scales(r + 8, b), m.scale_stride, 1);
  }

  // The same of a block that the end of the row cuts off.
  void load_last(const Matrix& m, int r, int b) {
    for (int half = 0; half < 2; half++) {
      const auto row = [&](int i) { return LastBlock(m, r + 8 * half + i, b); };
      const LastBlock last[] = {row(0), row(1), row(2), row(3), row(4), row(5), row(6), row(7)};
      fill(last->w, sizeof(LastBlock), last->scale, sizeof(LastBlock) / sizeof(bf16), half);
    }
  }

  // out[t][0..16) += group 2 * pair + odd of a block of x[t] . the rows
  template <int Tokens>
  [[gnu::always_inline]] void multiply_group(const Block<Digits>* const (&x)[Tokens], int64_t pair, int odd, float* out,
                                             int64_t out_stride) const {
    using I = Integers<Digits>;
    const uint8_t* w = q[2 * pair + odd][0][0][0];
    __m256i sum[Tokens][2];
#pragma GCC unroll 16
    for (int i = 0; i < 8 * Digits; i++) {
      const int j = i / (2 * Digits), p = i % (2 * Digits);
      const __m256i first = load(w + 64 * i), second = load(w + 64 * i + 32);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; t++) {
        int four;
        __builtin_memcpy(&four, x[t]->q[pair][p] + 16 * odd + 4 * j, 4);
        const __m256i bytes = _mm256_set1_epi32(four);
        const __m256i a = I::multiply(first, bytes), c = I::multiply(second, bytes);
        sum[t][0] = i ? I::add(sum[t][0], a) : a, sum[t][1] = i ? I::add(sum[t][1], c) : c;
        asm("" : "+x"(sum[t][0]), "+x"(sum[t][1]));  // or the compiler reorders the sums and spills them
      }
    }
    const float* s = scale[2 * pair + odd][0];
    const __m256 scales[] = {_mm256_load_ps(s), _mm256_load_ps(s + 8)};
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; t++) {
      const int64_t at = pair + 4 * odd;
      const __m256 d = _mm256_broadcast_ss(&x[t]->d[at]), c = _mm256_broadcast_ss(&x[t]->c[at]);
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        float* to = out + t * out_stride + 8 * h;
        const __m256 product = _mm256_fmadd_ps(_mm256_cvtepi32_ps(I::to_int32(sum[t][h])), d, c);
        _mm256_storeu_ps(to, _mm256_fmadd_ps(product, scales[h], _mm256_loadu_ps(to)));
      }
    }
  }

  // out[t][0..16) += block b of x[t] . the rows, asking for what is due a few at a time
  template <int Tokens>
  [[gnu::noinline]] void multiply(const Block<Digits>* const* x, int b, float* out, int64_t out_stride,
                                  Prefetch& ahead) const {
    const Block<Digits>* block[Tokens];
    for (int t = 0; t < Tokens; t++) block[t] = x[t] + b;
    for (int pair = 0; pair < kGroups / 2; pair++) {
      if (ahead.due > 0) {
        ahead.next_block(), ahead.next_block(), ahead.next_block(), ahead.next_block();
        ahead.due -= 4;
      }
      multiply_group<Tokens>(block, pair, 0, out, out_stride);
      multiply_group<Tokens>(block, pair, 1, out, out_stride);
    }
  }
};

// A strip of rows at a time, block after block. Many tokens have too many blocks of x for the cache: they are used for
// four panels while they are near, and while one is used the next is asked for. Fewer leave memory the bound: a strip
// of one panel asks for the least at a time, and memory is read from front to back.
template <int Digits>
void dot_panels(const Block<Digits>* const* x, int tokens, const Matrix& m, int rows, float* out, int out_stride) {
  alignas(64) Panel<Digits> panel;
  for (int t = 0; t < tokens; t++) __builtin_memset(out + t * out_stride, 0, rows * sizeof(float));
  const bool few = tokens <= kStripTokens;
  const int strip = few ? kPanelRows : kStripRows, blocks = blocks_of(m.n);
  auto ahead = Prefetch::group_ahead(m, strip);
  for (int first = 0; first < rows; first += strip) {
    const int end = rows - first < strip ? rows : first + strip;
    for (int b = 0; b < blocks; b++)
      for (int r = first; r < end; r += kPanelRows) {
        if (b < m.n / kBlock)
          panel.load_rows(m, r, b);
        else
          panel.load_last(m, r, b);
        const int next = r + kPanelRows;
        if (!few)
          ahead = Prefetch::block_of_rows(m, next < end || b + 1 == blocks ? next : first,
                                          next < end ? b : (b + 1) % blocks);
        ahead.due = kPanelRows;
        int t = 0;
        for (; t + kPanelTokens <= tokens; t += kPanelTokens)
          panel.template multiply<kPanelTokens>(x + t, b, out + t * out_stride + r, out_stride, ahead);
        if (tokens - t == 3) panel.template multiply<3>(x + t, b, out + t * out_stride + r, out_stride, ahead);
        if (tokens - t == 2) panel.template multiply<2>(x + t, b, out + t * out_stride + r, out_stride, ahead);
        if (tokens - t == 1) panel.template multiply<1>(x + t, b, out + t * out_stride + r, out_stride, ahead);
      }
  }
}

template <int Digits>
void dot_all(const void* const* rows_of_x, int tokens, const Matrix& m, int rows, float* out, int out_stride) {
  constexpr int kFew = 2 * Digits;  // tokens for which a panel is not worth its making
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

const QuantizedKernels avx2_quantized_kernels = {.row_bytes = row_bytes, .quantize = quantize, .dot = dot};

}  // namespace kimi::cpu
