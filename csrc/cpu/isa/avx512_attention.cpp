// Attention's products for AVX-512. As for AVX2, twelve elements of keys or values at a time against the 16 lanes of a
// register, which makes 12 sums and 13 loads for 12 multiply-adds.
#include <immintrin.h>

#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

static_assert(kLanes == 16, "one register");

// sums[i][r] = sum_k b[i * stride_i + k * stride_k] * a[k][r] for i < kCount; out = factor * sums, or with kAdd
// out = factor * out + sums.
template <int kCount, bool kAdd>
void tile(const float* a, const float* b, int64_t stride_i, int64_t stride_k, int n, const float* factor, float* out) {
  const __m512 f = _mm512_loadu_ps(factor);
  __m512 sum[kCount];
#pragma GCC unroll 12
  for (int i = 0; i < kCount; i++)
    sum[i] = kAdd ? _mm512_mul_ps(f, _mm512_loadu_ps(out + i * kLanes)) : _mm512_setzero_ps();
  for (int k = 0; k < n; k++) {
    const __m512 lanes = _mm512_loadu_ps(a + k * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kCount; i++)
      sum[i] = _mm512_fmadd_ps(_mm512_set1_ps(b[i * stride_i + k * stride_k]), lanes, sum[i]);
  }
#pragma GCC unroll 12
  for (int i = 0; i < kCount; i++) _mm512_storeu_ps(out + i * kLanes, kAdd ? sum[i] : _mm512_mul_ps(f, sum[i]));
}

template <bool kAdd>
void product(const float* a, const float* b, int64_t stride_i, int64_t stride_k, int count, int n, const float* factor,
             float* out) {
  int i = 0;
  for (; i + 12 <= count; i += 12) tile<12, kAdd>(a, b + i * stride_i, stride_i, stride_k, n, factor, out + i * kLanes);
  for (; i + 4 <= count; i += 4) tile<4, kAdd>(a, b + i * stride_i, stride_i, stride_k, n, factor, out + i * kLanes);
  for (; i < count; i++) tile<1, kAdd>(a, b + i * stride_i, stride_i, stride_k, n, factor, out + i * kLanes);
}

void scores(const float* q, const float* keys, int64_t stride, int rows, int n, float scale, float* out) {
  float factor[kLanes];
  for (float& f : factor) f = scale;
  product<false>(q, keys, stride, 1, rows, n, factor, out);
}

void add_values(const float* weights, const float* values, int64_t stride, int rows, int n, const float* factor,
                float* out) {
  product<true>(weights, values, 1, stride, n, rows, factor, out);
}

}  // namespace

const AttentionKernels avx512_attention_kernels = {
    .transpose = nullptr,
    .scores = scores,
    .soften = nullptr,
    .add_values = add_values,
    .soften_backward = nullptr,
};

}  // namespace kimi::cpu
