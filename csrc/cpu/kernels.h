// The table of inner loops an instruction set supplies. A table leaves null what it does not improve; isa.cpp fills the
// gap from the next lower one.
#pragma once
#include <cstddef>

#include "core/dtype.h"

namespace kimi::cpu {

// Products of INT4 weights with integers. Each group of 32 inputs of x becomes d * q, where d is its largest magnitude
// over the largest integer: 127 with one digit, 16319 = 128 * 127 + 63 with two, which may be signed bytes 128 * high +
// low or an int16. A group that is not finite gets d = NaN. A row of such inputs takes row_bytes(n), aligned to 64, in
// an order that suits the instruction set; n is a multiple of 32.
struct QuantizedKernels {
  size_t (*row_bytes)(int n, int digits);
  void (*quantize)(const float* x, int n, int digits, void* row);
  // out[t * out_stride + r] = x[t] . w[r], w_stride in bytes, scale_stride in elements. Sums over groups may have one
  // order for few tokens and another for more.
  void (*dot)(const void* const* x, int tokens, int digits, const uint8_t* w, int64_t w_stride, const bf16* scale,
              int64_t scale_stride, int rows, int n, float* out, int out_stride);
};

// Softmax attention of kLanes queries side by side: lane r of an array [n][kLanes] belongs to query r. Rows of keys and
// of values lie `stride` floats apart. Logarithms are to base 2.
constexpr int kLanes = 16;

struct AttentionKernels {
  // out[c * out_stride + r] = x[r * x_stride + c] for r < rows, c < columns
  void (*transpose)(const float* x, int64_t x_stride, int rows, int columns, float* out, int64_t out_stride);
  // out[j][r] = scale * sum_i keys[j][i] * q[i][r] for j < rows, i < n
  void (*scores)(const float* q, const float* keys, int64_t stride, int rows, int n, float scale, float* out);
  // maximum rises to that of scores[0..rows), factor = 2^(old maximum - new one), scores become weights
  // 2^(score - maximum), sum = factor * sum + theirs. A score of -inf weighs 0, NaN makes the sum NaN.
  void (*soften)(float* scores, int rows, float* maximum, float* sum, float* factor);
  // out[c][r] = factor[r] * out[c][r] + sum_j weights[j][r] * values[j][c] for c < n, j < rows
  void (*add_values)(const float* weights, const float* values, int64_t stride, int rows, int n, const float* factor,
                     float* out);
  // The gradient of the softmax of `rows` keys. A score becomes weight = 2^(score - lse[r]), dweights are those of the
  // weights, and dscore = scale * weight * (dweight - mean[r]): weights[j * stride + r], dscores[j * stride + r], and
  // dweights[j][r] is overwritten with the latter. lse is to base 2, and 0 where no key is seen.
  void (*soften_backward)(const float* scores, float* dweights, int rows, const float* lse, const float* mean,
                          float scale, float* weights, float* dscores, int64_t stride);
};

// The same two products in integers. Rows of a bf16 cache become d * q, d being their largest magnitude over kRowLimit.
// What they meet, kIntegerRun inputs of a query or the weights of up to kIntegerKeys keys, becomes d * q with a d in
// each lane for which the magnitudes of q add up to at most kLaneSum. So no sum of their products leaves int32: what
// rounding adds is less than 2^20 a product. What is not finite gets a d that is not. Magnitudes are summed in two
// halves, of even and of odd rows, so that all instruction sets round alike.
constexpr int kIntegerRun = 64, kIntegerKeys = 96;
constexpr int kIntegerStep = 16;  // rows of integers are filled with zeros up to whole steps
constexpr float kRowLimit = 11000, kLaneSum = (0x1p31f - 0x1p21f) / kRowLimit;

struct IntegerAttentionKernels {
  // The largest magnitude; what is not finite counts as larger than all numbers.
  float (*largest)(const bf16* x, int n);
  // Two rows times their factors, rounded, into q[h], and unless `pairs` is null into pairs [n][2]. 0 times infinity is
  // 0.
  void (*quantize_rows)(const bf16* const x[2], const float factor[2], int n, int16_t* const q[2], int16_t* pairs);
  // factor[i] * x[i][r] becomes d[r] * q with q [n / 2][kLanes][2]; an odd last row gets zeros beside it.
  void (*quantize_lanes)(const float* x, const float* factor, int n, int16_t* q, float* d);
  // out[j][r] = row_scale[j] * sum_i query_scale[run of i][r] * rows[j][i] * q[i][r] for j < count, i < n, or with
  // `add` that more. What lies at ahead[j][i] is asked for meanwhile, unless `ahead` is null.
  void (*scores)(const int16_t* q, const float* query_scale, const int16_t* rows, int64_t stride,
                 const float* row_scale, int count, int n, bool add, const bf16* const* ahead, float* out);
  // out[c][r] = factor[r] * out[c][r] + d[r] * sum_j weights[j][r] . pairs[j][c] over pairs of keys j < count, for c <
  // n; `stride` counts numbers.
  void (*add_values)(const int16_t* weights, const float* d, const int16_t* pairs, int64_t stride, int count, int n,
                     const float* factor, float* out);
};

// Products with stored weights in float32. Few tokens take the weights from where they lie. More multiply a strip of
// weight rows that is decoded once for all of them: panel [n][kStrip], aligned to 64. Strides and `ahead`
// are in elements, those of INT4 weights in bytes.
constexpr int kFewTokens = 8, kStrip = 16;

struct GemmKernels {
  // out[t * out_stride + r] = x[t] . w[r] for tokens <= kFewTokens. A product has one order, whatever tokens and rows
  // are.
  void (*few_bf16)(const float* const* x, int tokens, const bf16* w, int64_t w_stride, int rows, int n, float* out,
                   int out_stride);
  void (*few_int4)(const float* const* x, int tokens, const uint8_t* w, int64_t w_stride, const bf16* scale,
                   int64_t scale_stride, int rows, int n, float* out, int out_stride);
  // out[t * out_stride + c] = sum_i x[t][i] * w[i][c] for tokens <= kFewTokens, c < columns, i ascending
  void (*few_bf16_transposed)(const float* const* x, int tokens, const bf16* w, int64_t w_stride, int columns, int n,
                              float* out, int64_t out_stride);
  // panel[i * kStrip + r] = w[r][i] for rows <= kStrip, or w[i][r]; what lies beyond `rows` is any number. `ahead` is
  // the way from w to what will be packed next, to ask for it.
  void (*pack_bf16)(const bf16* w, int64_t w_stride, int64_t ahead, int rows, int n, float* panel);
  void (*pack_bf16_transposed)(const bf16* w, int64_t w_stride, int rows, int n, float* panel);
  void (*pack_int4)(const uint8_t* w, int64_t w_stride, int64_t ahead, const bf16* scale, int64_t scale_stride,
                    int rows, int n, float* panel);
  // sums[t * sums_stride + r] += sum_i x[t * x_stride + i] * panel[i * kStrip + r] for r < kStrip, i ascending
  void (*multiply)(const float* x, int64_t x_stride, int tokens, const float* panel, int n, float* sums,
                   int64_t sums_stride);
};

// Products of int8 weights [rows, n], 32 inputs of a row with a scale, with integers. Each group of 32 inputs of x
// becomes d * q: d is 2^-14 times the power of two that its largest magnitude has reached, q = min(rint(x / d), 32767).
// A group below 2^-100 becomes 0, one that is not finite gets d = NaN and q = 0.
constexpr int kInt8Block = 256, kInt8Rows = 64, kInt8Tokens = 96;

struct alignas(32) Int8Block {  // of a token; what lies beyond its last group is any number
  int16_t q[kInt8Block];
  float d[kInt8Block / 32];
};

struct Int8Kernels {
  // Inputs from b * kInt8Block on become blocks[b * stride]; n is a multiple of 32.
  void (*quantize)(const float* x, int n, Int8Block* blocks, int64_t stride);
  // out[t * out_stride + r] = x[t] . w[r] for tokens <= kInt8Tokens, and rows <= kInt8Rows if tokens > kFewTokens.
  // Block b of x[t] is x[b * x_stride + t]. A product has one order for few tokens and one for more.
  void (*dot)(const Int8Block* x, int64_t x_stride, int tokens, const int8_t* w, const bf16* scale, int rows, int n,
              float* out, int64_t out_stride);
};

struct Kernels {
  const char* name;

  float (*sum_squares)(const float* x, int64_t n);
  // out = x * scale * weight
  void (*scale_by_weight)(const float* x, const bf16* weight, float scale, float* out, int64_t n);
  void (*scale_by_float_weight)(const float* x, const float* weight, float scale, float* out, int64_t n);
  // With r = 1 / sqrt(mean of x^2 + eps): dx = r dout weight - r^3 (mean of dout weight x) x, dweight += r dout x
  void (*rms_norm_backward)(const float* x, const float* weight, const float* dout, float eps, float* dx,
                            float* dweight, int64_t n);
  void (*add_scaled)(float* y, float scale, const float* x, int64_t n);  // y += scale * x
  void (*widen)(const bf16* x, float* out, int64_t n);
  void (*narrow)(const float* x, bf16* out, int64_t n);
  void (*rope)(const float* x, const float* cos, const float* sin, float* out, int64_t pairs);
  void (*silu_and_mul)(const float* gate, const float* up, float* out, int64_t n);
  void (*silu_and_mul_backward)(const float* gate, const float* up, const float* dout, float* dgate, float* dup,
                                int64_t n);
  // out = (x - mean) / sqrt(mean of (x - mean)^2 + eps) * weight + bias
  void (*layer_norm)(const float* x, const bf16* weight, const bf16* bias, float eps, float* out, int64_t n);
  // out = gelu(x + bias) by erf or by tanh; bias may be null
  void (*gelu_erf)(const float* x, const bf16* bias, float* out, int64_t n);
  void (*gelu_tanh)(const float* x, const bf16* bias, float* out, int64_t n);
  void (*decode_int4)(const uint8_t* packed, const bf16* scale, float* out, int64_t groups);  // q * scale, exact

  const GemmKernels* gemm;
  const QuantizedKernels* quantized;
  const Int8Kernels* int8;
  const AttentionKernels* attention;
  const IntegerAttentionKernels* integer_attention;
};

extern const Kernels scalar_kernels, avx2_kernels, avx512_kernels, amx_kernels;
extern const AttentionKernels scalar_attention_kernels, avx2_attention_kernels, avx512_attention_kernels;
extern const IntegerAttentionKernels scalar_integer_attention_kernels, avx2_integer_attention_kernels;
extern const GemmKernels scalar_gemm_kernels, avx2_gemm_kernels, avx512_gemm_kernels;
extern const Int8Kernels scalar_int8_kernels, avx2_int8_kernels, avx512_int8_kernels;
extern const QuantizedKernels scalar_quantized_kernels, avx2_quantized_kernels, avx512_quantized_kernels,
    amx_quantized_kernels;

const Kernels& kernels();

// Instruction sets by name, lowest first; the list ends in nullptr. set_isa returns false for a name that is not in it.
const char* const* supported_isas();
bool set_isa(const char* name);

}  // namespace kimi::cpu
