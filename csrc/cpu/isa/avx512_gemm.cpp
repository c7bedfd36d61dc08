// Products with decoded weights in float32 for AVX-512; what reads weights from memory is that of AVX2.
#include <immintrin.h>

#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

static_assert(kStrip == 16, "one register");
constexpr int kTileTokens = 12;  // so many sums hide the multiply-add's latency, and 13 loads serve 12 of them

template <int kTokens>
void multiply_tile(const float* x, int64_t x_stride, const float* panel, int n, float* sums, int64_t sums_stride) {
  // Every loop over tokens is unrolled: one that is not would keep the sums in memory.
  __m512 sum[kTokens];
#pragma GCC unroll 12
  for (int t = 0; t < kTokens; t++) sum[t] = _mm512_setzero_ps();
  for (int i = 0; i < n; i++) {
    const __m512 weights = _mm512_load_ps(panel + i * kStrip);
#pragma GCC unroll 12
    for (int t = 0; t < kTokens; t++) sum[t] = _mm512_fmadd_ps(_mm512_set1_ps(x[t * x_stride + i]), weights, sum[t]);
  }
#pragma GCC unroll 12
  for (int t = 0; t < kTokens; t++) {
    float* to = sums + t * sums_stride;
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[t]));
  }
}

// Tiles of almost equal numbers of tokens: one alone would wait for each product.
void multiply(const float* x, int64_t x_stride, int tokens, const float* panel, int n, float* sums,
              int64_t sums_stride) {
  constexpr decltype(&multiply_tile<1>) kTiles[] = {
      multiply_tile<1>, multiply_tile<2>, multiply_tile<3>, multiply_tile<4>,  multiply_tile<5>,  multiply_tile<6>,
      multiply_tile<7>, multiply_tile<8>, multiply_tile<9>, multiply_tile<10>, multiply_tile<11>, multiply_tile<12>};
  const int tiles = (tokens + kTileTokens - 1) / kTileTokens;
  for (int i = 0; i < tiles; i++) {
    const int t = tokens * i / tiles, end = tokens * (i + 1) / tiles;
    kTiles[end - t - 1](x + t * x_stride, x_stride, panel, n, sums + t * sums_stride, sums_stride);
  }
}

constexpr GemmKernels table() {
  GemmKernels k{};
  k.multiply = multiply;
  return k;
}

}  // namespace

const GemmKernels avx512_gemm_kernels = table();

}  // namespace kimi::cpu
