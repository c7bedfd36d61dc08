// Integer products for AMX, of more than a few tokens; fewer go by AVX-512, whose rows of x these are. 16 tokens meet a
// panel of 16 rows of weights: a tile product is one group of one digit, because each group has a scale of its own.
#include "cpu/isa/avx512_panel.h"

namespace kimi::cpu {
namespace {

constexpr int kTileTokens = 16, kMaxTokens = 96;

// Tiles: 0 products of tokens [16] with rows [16], 1 tokens [16][32 bytes], 2 weights [8][16 rows][4 bytes]; 3 and 4
// are 0 and 1 of the second digit.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 32, 64, 64, 32};
  uint8_t rows[16] = {16, 16, 8, 16, 16};
};
constexpr TileConfig kConfig;

// Of 16 tokens a block of inputs as tiles take it: of each group the even ones, then the odd ones.
template <int Digits>
using Tokens = int8_t[kGroups][Digits][kTileTokens][32];

template <int Digits>
void pack(const Block<Digits>* const* x, int tokens, int b, Tokens<Digits>& to) {
  for (int t = 0; t < tokens; t++)
    for (int g = 0; g < kGroups; g++)
      for (int digit = 0; digit < Digits; digit++)
        for (int part = 0; part < 2; part++)
          _mm_store_si128(reinterpret_cast<__m128i*>(to[g][digit][t] + 16 * part),
                          load_quarter(x[t][b].q[digit][g / 4][part] + g % 4 * 16));
}

// out[t][0..16) += block b of x[t] . the rows of a panel, for up to 16 tokens
template <int Digits>
void multiply(const Panel& panel, const Tokens<Digits>& packed, const Block<Digits>* const* x, int tokens, int b,
              float* out, int out_stride, Prefetch& ahead) {
  alignas(64) int32_t products[Digits][kTileTokens][kPanelRows];
  asm("" ::: "memory");  // gcc 12 does not know that a tile load reads memory
  for (int g = 0; g < kGroups; g++) {
    if (ahead.due > 0) ahead.due--, ahead.next_block();  // a few at a time
    _tile_loadd(2, panel.q[g], 64);
    _tile_zero(0);
    _tile_loadd(1, packed[g][0], 32);
    _tile_dpbsud(0, 1, 2);
    _tile_stored(0, products[0], 64);
    if constexpr (Digits == 2) {
      _tile_zero(3);
      _tile_loadd(4, packed[g][1], 32);
      _tile_dpbsud(3, 4, 2);
      _tile_stored(3, products[1], 64);
    }
    const __m512 scale = _mm512_load_ps(panel.scale[g]);
    for (int t = 0; t < tokens; t++) {
      const int at = g % 4 * 4 + g / 4;
      __m512i p = _mm512_load_si512(products[0][t]);
      if constexpr (Digits == 2) p = _mm512_add_epi32(_mm512_slli_epi32(p, 7), _mm512_load_si512(products[1][t]));
      const __m512 d = _mm512_set1_ps(x[t][b].d[at]), c = _mm512_set1_ps(x[t][b].c[at]);
      float* to = out + t * out_stride;
      const __m512 product = _mm512_fmadd_ps(_mm512_cvtepi32_ps(p), d, c);
      _mm512_storeu_ps(to, _mm512_fmadd_ps(product, scale, _mm512_loadu_ps(to)));
    }
  }
}

template <int Digits>
void dot_panels(const Block<Digits>* const* x, int tokens, const Matrix& m, int rows, float* out, int out_stride) {
  alignas(64) Tokens<Digits> packed[kMaxTokens / kTileTokens];  // beyond the last token any numbers, of no use
  const auto some = [&](int t) { return tokens - t < kTileTokens ? tokens - t : kTileTokens; };
  int packed_block = -1;
  _tile_loadconfig(&kConfig);  // of this thread alone, and nobody else's while it is here
  for_each_panel(m, tokens, rows, out, out_stride, [&](const Panel& panel, int r, int b, Prefetch& ahead) {
    for (int t = 0; t < tokens; t += kTileTokens) {
      auto& tile = packed[t / kTileTokens];
      if (b != packed_block) pack(x + t, some(t), b, tile);
      multiply(panel, tile, x + t, some(t), b, out + t * out_stride + r, out_stride, ahead);
    }
    packed_block = b;
  });
  _tile_release();
}

template <int Digits>
void dot_all(const void* const* rows_of_x, int tokens, const Matrix& m, int rows, float* out, int out_stride) {
  const auto* const* x = reinterpret_cast<const Block<Digits>* const*>(rows_of_x);
  for (int t = 0; t < tokens; t += kMaxTokens)
    dot_panels(x + t, tokens - t < kMaxTokens ? tokens - t : kMaxTokens, m, rows, out + t * out_stride, out_stride);
}

void dot(const void* const* x, int tokens, int digits, const uint8_t* w, int64_t w_stride, const bf16* scale,
         int64_t scale_stride, int rows, int n, float* out, int out_stride) {
  const int panels = tokens > kFew ? rows / kPanelRows * kPanelRows : 0;
  const Matrix m{w, w_stride, scale, scale_stride, n};
  if (panels) (digits == 1 ? dot_all<1> : dot_all<2>)(x, tokens, m, panels, out, out_stride);
  if (panels < rows)
    avx512_quantized_kernels.dot(x, tokens, digits, w + panels * w_stride, w_stride, scale + panels * scale_stride,
                                 scale_stride, rows - panels, n, out + panels, out_stride);
}

}  // namespace

const QuantizedKernels amx_quantized_kernels = {.row_bytes = nullptr, .quantize = nullptr, .dot = dot};

}  // namespace kimi::cpu
