// The plain version of attention's inner loops.
#include <math.h>

#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

void transpose(const float* x, int64_t x_stride, int rows, int columns, float* out, int64_t out_stride) {
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c++) out[c * out_stride + r] = x[r * x_stride + c];
}

void scores(const float* q, const float* keys, int64_t stride, int rows, int n, float scale, float* out) {
  for (int j = 0; j < rows; j++)
    for (int r = 0; r < kLanes; r++) {
      float sum = 0;
      for (int i = 0; i < n; i++) sum += keys[j * stride + i] * q[i * kLanes + r];
      out[j * kLanes + r] = scale * sum;
    }
}

void soften(float* scores, int rows, float* maximum, float* sum, float* factor) {
  for (int r = 0; r < kLanes; r++) {
    const float before = maximum[r];
    for (int j = 0; j < rows; j++)
      if (scores[j * kLanes + r] > maximum[r]) maximum[r] = scores[j * kLanes + r];
    const float base = maximum[r] == -INFINITY ? 0.0f : maximum[r];  // -inf - -inf would be NaN
    float total = 0;
    for (int j = 0; j < rows; j++) total += scores[j * kLanes + r] = exp2f(scores[j * kLanes + r] - base);
    factor[r] = exp2f(before - base);
    sum[r] = factor[r] * sum[r] + total;
  }
}

void soften_backward(const float* scores, float* dweights, int rows, const float* lse, const float* mean, float scale,
                     float* weights, float* dscores, int64_t stride) {
  for (int j = 0; j < rows; j++)
    for (int r = 0; r < kLanes; r++) {
      const float weight = exp2f(scores[j * kLanes + r] - lse[r]);
      const float dscore = scale * weight * (dweights[j * kLanes + r] - mean[r]);
      weights[j * stride + r] = weight;
      dweights[j * kLanes + r] = dscores[j * stride + r] = dscore;
    }
}

void add_values(const float* weights, const float* values, int64_t stride, int rows, int n, const float* factor,
                float* out) {
  for (int c = 0; c < n; c++)
    for (int r = 0; r < kLanes; r++) {
      float sum = factor[r] * out[c * kLanes + r];
      for (int j = 0; j < rows; j++) sum += weights[j * kLanes + r] * values[j * stride + c];
      out[c * kLanes + r] = sum;
    }
}

}  // namespace

const AttentionKernels scalar_attention_kernels = {
    .transpose = transpose,
    .scores = scores,
    .soften = soften,
    .add_values = add_values,
    .soften_backward = soften_backward,
};

}  // namespace kimi::cpu
