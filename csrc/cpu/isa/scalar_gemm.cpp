// The plain version of the products with stored weights: what the other tables are tested against.
#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

float int4_value(const uint8_t* packed, const bf16* scale, int i) {
  return float((packed[i / 2] >> (i % 2 * 4) & 15) - 8) * to_float(scale[i / 32]);
}

// weight(r, i) -> float
template <class Weight>
void few(const float* const* x, int tokens, int rows, int n, float* out, int64_t out_stride, Weight weight) {
  for (int t = 0; t < tokens; t++)
    for (int r = 0; r < rows; r++) {
      float sum = 0;
      for (int i = 0; i < n; i++) sum += x[t][i] * weight(r, i);
      out[t * out_stride + r] = sum;
    }
}

void few_bf16(const float* const* x, int tokens, const bf16* w, int64_t w_stride, int rows, int n, float* out,
              int out_stride) {
  few(x, tokens, rows, n, out, out_stride, [=](int r, int i) { return to_float(w[r * w_stride + i]); });
}

void few_int4(const float* const* x, int tokens, const uint8_t* w, int64_t w_stride, const bf16* scale,
              int64_t scale_stride, int rows, int n, float* out, int out_stride) {
  few(x, tokens, rows, n, out, out_stride,
      [=](int r, int i) { return int4_value(w + r * w_stride, scale + r * scale_stride, i); });
}

void few_bf16_transposed(const float* const* x, int tokens, const bf16* w, int64_t w_stride, int columns, int n,
                         float* out, int64_t out_stride) {
  few(x, tokens, columns, n, out, out_stride, [=](int c, int i) { return to_float(w[i * w_stride + c]); });
}

template <class Weight>
void pack(int rows, int n, float* panel, Weight weight) {
  for (int i = 0; i < n; i++)
    for (int r = 0; r < kStrip; r++) panel[i * kStrip + r] = r < rows ? weight(r, i) : 0;
}

void pack_bf16(const bf16* w, int64_t w_stride, int64_t, int rows, int n, float* panel) {
  pack(rows, n, panel, [=](int r, int i) { return to_float(w[r * w_stride + i]); });
}

void pack_bf16_transposed(const bf16* w, int64_t w_stride, int rows, int n, float* panel) {
  pack(rows, n, panel, [=](int r, int i) { return to_float(w[i * w_stride + r]); });
}

void pack_int4(const uint8_t* w, int64_t w_stride, int64_t, const bf16* scale, int64_t scale_stride, int rows, int n,
               float* panel) {
  pack(rows, n, panel, [=](int r, int i) { return int4_value(w + r * w_stride, scale + r * scale_stride, i); });
}

void multiply(const float* x, int64_t x_stride, int tokens, const float* panel, int n, float* sums,
              int64_t sums_stride) {
  for (int t = 0; t < tokens; t++) {
    float sum[kStrip] = {};
    for (int i = 0; i < n; i++)
      for (int r = 0; r < kStrip; r++) sum[r] += x[t * x_stride + i] * panel[i * kStrip + r];
    for (int r = 0; r < kStrip; r++) sums[t * sums_stride + r] += sum[r];
  }
}

}  // namespace

const GemmKernels scalar_gemm_kernels = {
    .few_bf16 = few_bf16,
    .few_int4 = few_int4,
    .few_bf16_transposed = few_bf16_transposed,
    .pack_bf16 = pack_bf16,
    .pack_bf16_transposed = pack_bf16_transposed,
    .pack_int4 = pack_int4,
    .multiply = multiply,
};

}  // namespace kimi::cpu
