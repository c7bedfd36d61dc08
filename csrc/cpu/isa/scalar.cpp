// The plain version of every inner loop: the reference that the other tables are tested against.
#include <math.h>

#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

float sum_squares(const float* x, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
  return sum;
}

void scale_by_weight(const float* x, const bf16* weight, float scale, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * to_float(weight[i]);
}

void scale_by_float_weight(const float* x, const float* weight, float scale, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

void rms_norm_backward(const float* x, const float* weight, const float* dout, float eps, float* dx, float* dweight,
                       int64_t n) {
  float squares = 0, dot = 0;
  for (int64_t i = 0; i < n; i++) {
    squares += x[i] * x[i];
    dot += dout[i] * weight[i] * x[i];
  }
  const float r = 1.0f / sqrtf(squares / float(n) + eps), along = r * r * r * (dot / float(n));
  for (int64_t i = 0; i < n; i++) {
    dx[i] = r * (dout[i] * weight[i]) - along * x[i];
    dweight[i] += r * (dout[i] * x[i]);
  }
}

void add_scaled(float* y, float scale, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] += scale * x[i];
}

void widen(const bf16* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = to_float(x[i]);
}

void narrow(const float* x, bf16* out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = to_bf16(x[i]);
}

void rope(const float* x, const float* cos, const float* sin, float* out, int64_t pairs) {
  for (int64_t i = 0; i < pairs; i++) {
    const float a = x[2 * i], b = x[2 * i + 1];
    out[2 * i] = a * cos[i] - b * sin[i];
    out[2 * i + 1] = a * sin[i] + b * cos[i];
  }
}

void silu_and_mul(const float* gate, const float* up, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

// As exp is taken of -|gate| alone, neither s = 1 / (1 + exp(-gate)) nor 1 - s cancels or overflows.
void silu_and_mul_backward(const float* gate, const float* up, const float* dout, float* dgate, float* dup, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const float g = gate[i], e = expf(-fabsf(g)), large = 1.0f / (1.0f + e), small = e * large;
    const float s = g < 0 ? small : large, rest = g < 0 ? large : small;
    const float ds = dout[i] * s;
    dgate[i] = ds * up[i] * (1.0f + g * rest);
    dup[i] = ds * g;
  }
}

void layer_norm(const float* x, const bf16* weight, const bf16* bias, float eps, float* out, int64_t n) {
  float sum = 0, squares = 0;
  for (int64_t i = 0; i < n; i++) sum += x[i];
  const float mean = sum / float(n);
  for (int64_t i = 0; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / sqrtf(squares / float(n) + eps);
  for (int64_t i = 0; i < n; i++) out[i] = (x[i] - mean) * scale * to_float(weight[i]) + to_float(bias[i]);
}

void gelu_erf(const float* x, const bf16* bias, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const float v = x[i] + (bias ? to_float(bias[i]) : 0.0f);
    out[i] = 0.5f * v * erfcf(-0.707106781f * v);
  }
}

// 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2 u))
void gelu_tanh(const float* x, const bf16* bias, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const float v = x[i] + (bias ? to_float(bias[i]) : 0.0f);
    out[i] = v / (1.0f + expf(-1.595769122f * v * (1.0f + 0.044715f * v * v)));
  }
}

void decode_int4(const uint8_t* packed, const bf16* scale, float* out, int64_t groups) {
  for (int64_t g = 0; g < groups; g++, packed += 16, out += 32)
    for (int i = 0; i < 32; i++) out[i] = float((packed[i / 2] >> (i % 2 * 4) & 15) - 8) * to_float(scale[g]);
}

}  // namespace

const Kernels scalar_kernels = {
    .name = "scalar",
    .sum_squares = sum_squares,
    .scale_by_weight = scale_by_weight,
    .scale_by_float_weight = scale_by_float_weight,
    .rms_norm_backward = rms_norm_backward,
    .add_scaled = add_scaled,
    .widen = widen,
    .narrow = narrow,
    .rope = rope,
    .silu_and_mul = silu_and_mul,
    .silu_and_mul_backward = silu_and_mul_backward,
    .layer_norm = layer_norm,
    .gelu_erf = gelu_erf,
    .gelu_tanh = gelu_tanh,
    .decode_int4 = decode_int4,
    .gemm = &scalar_gemm_kernels,
    .quantized = &scalar_quantized_kernels,
    .int8 = &scalar_int8_kernels,
    .attention = &scalar_attention_kernels,
    .integer_attention = &scalar_integer_attention_kernels,
};

}  // namespace kimi::cpu
