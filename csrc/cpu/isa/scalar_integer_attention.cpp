// The plain version of attention's products in integers.
#include <math.h>

#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

// x * factor rounded once, 0 if it is not finite
int16_t nearest(float x, float factor) {
  const double product = double(x) * factor;
  return isfinite(product) ? int16_t(rint(product)) : int16_t(0);
}

float largest(const bf16* x, int n) {
  bf16 most{0};
  for (int i = 0; i < n; i++)
    if (const uint16_t bits = x[i].bits & 0x7fff; bits > most.bits) most.bits = bits;
  return to_float(most);
}

void quantize_rows(const bf16* const x[2], const float factor[2], int n, int16_t* const q[2], int16_t* pairs) {
  for (int h = 0; h < 2; h++)
    for (int i = 0; i < n || i % kIntegerStep; i++) {
      q[h][i] = i < n ? nearest(to_float(x[h][i]), factor[h]) : int16_t(0);
      if (pairs) pairs[2 * i + h] = q[h][i];
    }
}

void quantize_lanes(const float* x, const float* factor, int n, int16_t* q, float* d) {
  for (int r = 0; r < kLanes; r++) {
    const auto at = [&](int i) { return i < n ? factor[i] * x[i * kLanes + r] : 0.0f; };
    float sum[2] = {}, most = 0;
    for (int i = 0; i < n; i++) {
      sum[i % 2] += fabsf(at(i));
      most = fmaxf(most, fabsf(at(i)));
    }
    d[r] = (sum[0] + sum[1]) * (1 / kLaneSum);
    if (d[r] < most * (1.0f / 32767)) d[r] = most * (1.0f / 32767);
    for (int i = 0; i < n || i % 2; i++) q[i / 2 * 2 * kLanes + 2 * r + i % 2] = nearest(at(i), 1 / d[r]);
  }
}

void scores(const int16_t* q, const float* query_scale, const int16_t* rows, int64_t stride, const float* row_scale,
            int count, int n, bool add, const bf16* const*, float* out) {
  for (int j = 0; j < count; j++)
    for (int r = 0; r < kLanes; r++) {
      float total = add ? out[j * kLanes + r] : 0;
      for (int begin = 0; begin < n; begin += kIntegerRun) {
        int sum = 0;
        for (int i = begin; i < n && i < begin + kIntegerRun; i++)
          sum += rows[j * stride + i] * q[i / 2 * 2 * kLanes + 2 * r + i % 2];
        total += float(sum) * row_scale[j] * query_scale[begin / kIntegerRun * kLanes + r];
      }
      out[j * kLanes + r] = total;
    }
}

void add_values(const int16_t* weights, const float* d, const int16_t* pairs, int64_t stride, int count, int n,
                const float* factor, float* out) {
  for (int c = 0; c < n; c++)
    for (int r = 0; r < kLanes; r++) {
      int sum = 0;
      for (int j = 0; j < count; j++)
        for (int h = 0; h < 2; h++) sum += weights[(j * kLanes + r) * 2 + h] * pairs[j * stride + 2 * c + h];
      out[c * kLanes + r] = factor[r] * out[c * kLanes + r] + float(sum) * d[r];
    }
}

}  // namespace

const IntegerAttentionKernels scalar_integer_attention_kernels = {
    .largest = largest,
    .quantize_rows = quantize_rows,
    .quantize_lanes = quantize_lanes,
    .scores = scores,
    .add_values = add_values,
};

}  // namespace kimi::cpu
