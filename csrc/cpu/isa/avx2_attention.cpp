// Attention for AVX2 + FMA. A lane is a query: both products broadcast elements of rows of keys and values, six at a
// time against 16 lanes, which makes 12 sums in registers and 8 loads for 12 multiply-adds.
#include <immintrin.h>

#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

static_assert(kLanes == 16, "two registers");

// sums[i][r] = sum_k b[i * stride_i + k * stride_k] * a[k][r] for i < kCount; out = factor * sums, or with kAdd
// out = factor * out + sums.
template <int kCount, bool kAdd>
void tile(const float* a, const float* b, int64_t stride_i, int64_t stride_k, int n, const float* factor, float* out) {
  const __m256 f = _mm256_loadu_ps(factor), g = _mm256_loadu_ps(factor + 8);
  __m256 u[kCount], v[kCount];
#pragma GCC unroll 6
  for (int i = 0; i < kCount; i++) {
    u[i] = kAdd ? _mm256_mul_ps(f, _mm256_loadu_ps(out + i * kLanes)) : _mm256_setzero_ps();
    v[i] = kAdd ? _mm256_mul_ps(g, _mm256_loadu_ps(out + i * kLanes + 8)) : _mm256_setzero_ps();
  }
  for (int k = 0; k < n; k++) {
    const __m256 low = _mm256_loadu_ps(a + k * kLanes), high = _mm256_loadu_ps(a + k * kLanes + 8);
#pragma GCC unroll 6
    for (int i = 0; i < kCount; i++) {
      const __m256 w = _mm256_broadcast_ss(b + i * stride_i + k * stride_k);
      u[i] = _mm256_fmadd_ps(w, low, u[i]);
      v[i] = _mm256_fmadd_ps(w, high, v[i]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kCount; i++) {
    _mm256_storeu_ps(out + i * kLanes, kAdd ? u[i] : _mm256_mul_ps(f, u[i]));
    _mm256_storeu_ps(out + i * kLanes + 8, kAdd ? v[i] : _mm256_mul_ps(g, v[i]));
  }
}

template <bool kAdd>
void product(const float* a, const float* b, int64_t stride_i, int64_t stride_k, int count, int n, const float* factor,
             float* out) {
  int i = 0;
  for (; i + 6 <= count; i += 6) tile<6, kAdd>(a, b + i * stride_i, stride_i, stride_k, n, factor, out + i * kLanes);
  for (; i + 2 <= count; i += 2) tile<2, kAdd>(a, b + i * stride_i, stride_i, stride_k, n, factor, out + i * kLanes);
  if (i < count) tile<1, kAdd>(a, b + i * stride_i, stride_i, stride_k, n, factor, out + i * kLanes);
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

// 2^x for x <= 0, relative error about 1e-7; less than 2^-126 gives 0, NaN stays NaN.
__m256 exp2_of_negative(__m256 x) {
  const __m256 lowest = _mm256_set1_ps(-126.0f);
  const __m256 clamped = _mm256_max_ps(lowest, x);  // the second operand if one is NaN
  const __m256 n = _mm256_round_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 r = _mm256_sub_ps(clamped, n);
  __m256 p = _mm256_set1_ps(1.535336203e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.339887465e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(9.618437359e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.550332471e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(2.402264791e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(6.931472029e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  return _mm256_and_ps(_mm256_mul_ps(p, power), _mm256_cmp_ps(x, lowest, _CMP_NLT_UQ));
}

void soften(float* scores, int rows, float* maximum, float* sum, float* factor) {
  const __m256 none = _mm256_set1_ps(-__builtin_inff());
  for (int r = 0; r < kLanes; r += 8) {
    const __m256 before = _mm256_loadu_ps(maximum + r);
    __m256 largest = before;
    for (int j = 0; j < rows; j++) largest = _mm256_max_ps(_mm256_loadu_ps(scores + j * kLanes + r), largest);
    _mm256_storeu_ps(maximum + r, largest);
    // -inf - -inf would be NaN: such keys weigh nothing
    const __m256 base = _mm256_blendv_ps(largest, _mm256_setzero_ps(), _mm256_cmp_ps(largest, none, _CMP_EQ_OQ));
    __m256 total = _mm256_setzero_ps();
    for (int j = 0; j < rows; j++) {
      float* at = scores + j * kLanes + r;
      const __m256 weight = exp2_of_negative(_mm256_sub_ps(_mm256_loadu_ps(at), base));
      _mm256_storeu_ps(at, weight);
      total = _mm256_add_ps(total, weight);
    }
    const __m256 shrink = exp2_of_negative(_mm256_sub_ps(before, base));
    _mm256_storeu_ps(factor + r, shrink);
    _mm256_storeu_ps(sum + r, _mm256_fmadd_ps(shrink, _mm256_loadu_ps(sum + r), total));
  }
}

void soften_backward(const float* scores, float* dweights, int rows, const float* lse, const float* mean, float scale,
                     float* weights, float* dscores, int64_t stride) {
  const __m256 factor = _mm256_set1_ps(scale);
  for (int r = 0; r < kLanes; r += 8) {
    const __m256 base = _mm256_loadu_ps(lse + r), m = _mm256_loadu_ps(mean + r);
    for (int j = 0; j < rows; j++) {
      float* at = dweights + j * kLanes + r;
      const __m256 weight = exp2_of_negative(_mm256_sub_ps(_mm256_loadu_ps(scores + j * kLanes + r), base));
      const __m256 centred = _mm256_sub_ps(_mm256_loadu_ps(at), m);
      const __m256 dscore = _mm256_mul_ps(_mm256_mul_ps(factor, weight), centred);
      _mm256_storeu_ps(weights + j * stride + r, weight);
      _mm256_storeu_ps(dscores + j * stride + r, dscore);
      _mm256_storeu_ps(at, dscore);
    }
  }
}

void transpose_8x8(const float* x, int64_t x_stride, float* out, int64_t out_stride) {
  __m256 row[8], pair[8];
  for (int i = 0; i < 8; i++) row[i] = _mm256_loadu_ps(x + i * x_stride);
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int h = 0; h < 2; h++) {
      row[i + 2 * h] = _mm256_shuffle_ps(pair[i + h], pair[i + h + 2], 0x44);
      row[i + 2 * h + 1] = _mm256_shuffle_ps(pair[i + h], pair[i + h + 2], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(row[i], row[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * out_stride, _mm256_permute2f128_ps(row[i], row[i + 4], 0x31));
  }
}

void transpose(const float* x, int64_t x_stride, int rows, int columns, float* out, int64_t out_stride) {
  const int whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  for (int r = 0; r < whole_rows; r += 8)
    for (int c = 0; c < whole_columns; c += 8)
      transpose_8x8(x + r * x_stride + c, x_stride, out + c * out_stride + r, out_stride);
  for (int r = 0; r < rows; r++)
    for (int c = r < whole_rows ? whole_columns : 0; c < columns; c++) out[c * out_stride + r] = x[r * x_stride + c];
}

}  // namespace

const AttentionKernels avx2_attention_kernels = {
    .transpose = transpose,
    .scores = scores,
    .soften = soften,
    .add_values = add_values,
    .soften_backward = soften_backward,
};

}  // namespace kimi::cpu
