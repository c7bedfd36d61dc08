// Inner loops for AVX2 + FMA + F16C.
#include <immintrin.h>

#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

__m256 load_bf16(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

float sum_lanes(__m256 v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}

// exp(x), relative error about 2e-7: 2^n times a polynomial in the remainder; overflow gives inf, NaN stays NaN.
__m256 exp8(__m256 x) {
  const __m256 lowest = _mm256_set1_ps(-87.33f), highest = _mm256_set1_ps(88.72f);
  // max and min return their second operand when one is NaN.
  const __m256 clamped = _mm256_min_ps(highest, _mm256_max_ps(lowest, x));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(clamped, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), clamped);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_fmadd_ps(_mm256_mul_ps(p, r), r, _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
  // Two halves of the exponent: 2^128 alone would not fit.
  const __m256i exponent = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(exponent, 1);
  const auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  p = _mm256_mul_ps(_mm256_mul_ps(p, power(half)), power(_mm256_sub_epi32(exponent, half)));
  p = _mm256_blendv_ps(p, _mm256_setzero_ps(), _mm256_cmp_ps(x, lowest, _CMP_LT_OQ));
  return _mm256_blendv_ps(p, _mm256_set1_ps(__builtin_inff()), _mm256_cmp_ps(x, highest, _CMP_GT_OQ));
}

// The first n < 8 lanes are loaded or stored, the others are zero or left alone.
__m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

float sum_squares(const float* x, int64_t n) {
  __m256 a = _mm256_setzero_ps(), b = a;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256 u = _mm256_loadu_ps(x + i), v = _mm256_loadu_ps(x + i + 8);
    a = _mm256_fmadd_ps(u, u, a);
    b = _mm256_fmadd_ps(v, v, b);
  }
  float sum = sum_lanes(_mm256_add_ps(a, b));
  for (; i < n; i++) sum += x[i] * x[i];
  return sum;
}

void scale_by_weight(const float* x, const bf16* weight, float scale, float* out, int64_t n) {
  const __m256 s = _mm256_set1_ps(scale);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), s), load_bf16(weight + i)));
  for (; i < n; i++) out[i] = x[i] * scale * to_float(weight[i]);
}

void scale_by_float_weight(const float* x, const float* weight, float scale, float* out, int64_t n) {
  const __m256 s = _mm256_set1_ps(scale);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), s), _mm256_loadu_ps(weight + i)));
  for (; i < n; i++) out[i] = x[i] * scale * weight[i];
}

void rms_norm_backward(const float* x, const float* weight, const float* dout, float eps, float* dx, float* dweight,
                       int64_t n) {
  const int64_t whole = n / 8 * 8;
  __m256 a = _mm256_setzero_ps(), b = a;
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    a = _mm256_fmadd_ps(v, v, a);
    b = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_loadu_ps(dout + i), _mm256_loadu_ps(weight + i)), v, b);
  }
  float squares = sum_lanes(a), dot = sum_lanes(b);
  for (int64_t i = whole; i < n; i++) {
    squares += x[i] * x[i];
    dot += dout[i] * weight[i] * x[i];
  }
  const float r = 1.0f / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(squares / float(n) + eps)));
  const float along = r * r * r * (dot / float(n));
  const __m256 factor = _mm256_set1_ps(r), share = _mm256_set1_ps(along);
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i), d = _mm256_mul_ps(factor, _mm256_loadu_ps(dout + i));
    _mm256_storeu_ps(dweight + i, _mm256_fmadd_ps(d, v, _mm256_loadu_ps(dweight + i)));
    _mm256_storeu_ps(dx + i, _mm256_fnmadd_ps(share, v, _mm256_mul_ps(d, _mm256_loadu_ps(weight + i))));
  }
  for (int64_t i = whole; i < n; i++) {
    dweight[i] += r * dout[i] * x[i];
    dx[i] = r * dout[i] * weight[i] - along * x[i];
  }
}

void add_scaled(float* y, float scale, const float* x, int64_t n) {
  const __m256 s = _mm256_set1_ps(scale);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(y + i, _mm256_fmadd_ps(s, _mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
  for (; i < n; i++) y[i] += scale * x[i];
}

void widen(const bf16* x, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, load_bf16(x + i));
  for (; i < n; i++) out[i] = to_float(x[i]);
}

void narrow(const float* x, bf16* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i bits = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), packed);
  }
  for (; i < n; i++) out[i] = to_bf16(x[i]);
}

void rope(const float* x, const float* cos, const float* sin, float* out, int64_t pairs) {
  const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  int64_t i = 0;
  for (; i + 4 <= pairs; i += 4) {
    const __m256 v = _mm256_loadu_ps(x + 2 * i), swapped = _mm256_permute_ps(v, 0xb1);
    const __m256 c = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(cos + i)), twice);
    const __m256 s = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(sin + i)), twice);
    _mm256_storeu_ps(out + 2 * i, _mm256_addsub_ps(_mm256_mul_ps(v, c), _mm256_mul_ps(swapped, s)));
  }
  for (; i < pairs; i++) {
    const float a = x[2 * i], b = x[2 * i + 1];
    out[2 * i] = a * cos[i] - b * sin[i];
    out[2 * i + 1] = a * sin[i] + b * cos[i];
  }
}

__m256 silu8(__m256 gate) {
  const __m256 one = _mm256_set1_ps(1.0f);
  return _mm256_div_ps(gate, _mm256_add_ps(one, exp8(_mm256_xor_ps(gate, _mm256_set1_ps(-0.0f)))));
}

void silu_and_mul(const float* gate, const float* up, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_mul_ps(silu8(_mm256_loadu_ps(gate + i)), _mm256_loadu_ps(up + i)));
  if (i == n) return;
  const __m256i mask = first_lanes(n - i);
  const __m256 product = _mm256_mul_ps(silu8(_mm256_maskload_ps(gate + i, mask)), _mm256_maskload_ps(up + i, mask));
  _mm256_maskstore_ps(out + i, mask, product);
}

// As exp is taken of -|gate| alone, neither s = 1 / (1 + exp(-gate)) nor 1 - s cancels or overflows.
struct SiluGradient {
  __m256 dgate, dup;

  SiluGradient(__m256 gate, __m256 up, __m256 dout) {
    const __m256 one = _mm256_set1_ps(1.0f), e = exp8(_mm256_or_ps(gate, _mm256_set1_ps(-0.0f)));
    const __m256 large = _mm256_div_ps(one, _mm256_add_ps(one, e)), small = _mm256_mul_ps(e, large);
    const __m256 ds = _mm256_mul_ps(dout, _mm256_blendv_ps(large, small, gate));  // by the sign of gate
    const __m256 rest = _mm256_blendv_ps(small, large, gate);
    dgate = _mm256_mul_ps(_mm256_mul_ps(ds, up), _mm256_fmadd_ps(gate, rest, one));
    dup = _mm256_mul_ps(ds, gate);
  }
};

void silu_and_mul_backward(const float* gate, const float* up, const float* dout, float* dgate, float* dup, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const SiluGradient d(_mm256_loadu_ps(gate + i), _mm256_loadu_ps(up + i), _mm256_loadu_ps(dout + i));
    _mm256_storeu_ps(dgate + i, d.dgate);
    _mm256_storeu_ps(dup + i, d.dup);
  }
  if (i == n) return;
  const __m256i mask = first_lanes(n - i);
  const SiluGradient d(_mm256_maskload_ps(gate + i, mask), _mm256_maskload_ps(up + i, mask),
                       _mm256_maskload_ps(dout + i, mask));
  _mm256_maskstore_ps(dgate + i, mask, d.dgate);
  _mm256_maskstore_ps(dup + i, mask, d.dup);
}

void layer_norm(const float* x, const bf16* weight, const bf16* bias, float eps, float* out, int64_t n) {
  const int64_t whole = n / 8 * 8;
  __m256 a = _mm256_setzero_ps();
  for (int64_t i = 0; i < whole; i += 8) a = _mm256_add_ps(a, _mm256_loadu_ps(x + i));
  float sum = sum_lanes(a);
  for (int64_t i = whole; i < n; i++) sum += x[i];
  const float mean = sum / float(n);
  const __m256 m = _mm256_set1_ps(mean);
  a = _mm256_setzero_ps();
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256 d = _mm256_sub_ps(_mm256_loadu_ps(x + i), m);
    a = _mm256_fmadd_ps(d, d, a);
  }
  sum = sum_lanes(a);
  for (int64_t i = whole; i < n; i++) sum += (x[i] - mean) * (x[i] - mean);
  const __m256 s = _mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_sqrt_ps(_mm256_set1_ps(sum / float(n) + eps)));
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256 unit = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + i), m), s);
    _mm256_storeu_ps(out + i, _mm256_fmadd_ps(unit, load_bf16(weight + i), load_bf16(bias + i)));
  }
  for (int64_t i = whole; i < n; i++)
    out[i] = (x[i] - mean) * _mm256_cvtss_f32(s) * to_float(weight[i]) + to_float(bias[i]);
}

// x Phi(x). Phi(-|x|) = exp(-x^2 / 2) g(|x|), where g, a polynomial in 1 / (1 + 0.4 |x|), is off by 7e-8 of itself
// as far as the exponential is not 0.
__m256 gelu_erf8(__m256 x) {
  const __m256 one = _mm256_set1_ps(1.0f), magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
  const __m256 t = _mm256_div_ps(one, _mm256_fmadd_ps(_mm256_set1_ps(0.4f), magnitude, one));
  constexpr float kCoefficients[] = {2.026606202e-1f, -3.774213493e-1f, 2.546855211e-1f, -1.458334271e-2f,
                                     1.592079401e-1f, 1.556178331e-1f,  1.599236429e-1f, -1.291433546e-5f};
  __m256 g = _mm256_set1_ps(-4.007797316e-2f);
  for (const float c : kCoefficients) g = _mm256_fmadd_ps(g, t, _mm256_set1_ps(c));
  const __m256 phi = _mm256_mul_ps(exp8(_mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(-0.5f), x), x)), g);
  return _mm256_mul_ps(x, _mm256_blendv_ps(_mm256_sub_ps(one, phi), phi, x));  // by the sign of x
}

// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u))
__m256 gelu_tanh8(__m256 x) {
  const __m256 one = _mm256_set1_ps(1.0f), cubic = _mm256_fmadd_ps(_mm256_set1_ps(0.044715f), _mm256_mul_ps(x, x), one);
  const __m256 e = exp8(_mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(-1.595769122f), x), cubic));
  return _mm256_div_ps(x, _mm256_add_ps(one, e));
}

template <__m256 (*function)(__m256)>
void gelu(const float* x, const bf16* bias, float* out, int64_t n) {
  int64_t i = 0;
  if (bias)
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(out + i, function(_mm256_add_ps(_mm256_loadu_ps(x + i), load_bf16(bias + i))));
  else
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, function(_mm256_loadu_ps(x + i)));
  if (i == n) return;
  float rest[8] = {};
  for (int64_t j = i; j < n; j++) rest[j - i] = x[j] + (bias ? to_float(bias[j]) : 0.0f);
  _mm256_maskstore_ps(out + i, first_lanes(n - i), function(_mm256_loadu_ps(rest)));
}

// 32 weights: low nibbles are the even inputs, high nibbles the odd ones; q * scale is exact in float32.
void decode_group(const uint8_t* packed, const bf16* scale, __m256 out[4]) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const __m128i mask = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
  const __m128i even = _mm_sub_epi8(_mm_and_si128(bytes, mask), eight);
  const __m128i odd = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask), eight);
  const __m128i first = _mm_unpacklo_epi8(even, odd), last = _mm_unpackhi_epi8(even, odd);
  const __m256 s = _mm256_set1_ps(to_float(*scale));
  const auto widen8 = [s](__m128i q) { return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)), s); };
  out[0] = widen8(first);
  out[1] = widen8(_mm_unpackhi_epi64(first, first));
  out[2] = widen8(last);
  out[3] = widen8(_mm_unpackhi_epi64(last, last));
}

void decode_int4(const uint8_t* packed, const bf16* scale, float* out, int64_t groups) {
  for (int64_t g = 0; g < groups; g++) {
    __m256 w[4];
    decode_group(packed + 16 * g, scale + g, w);
    for (int i = 0; i < 4; i++) _mm256_storeu_ps(out + 32 * g + 8 * i, w[i]);
  }
}

}  // namespace

const Kernels avx2_kernels = {
    .name = "avx2",
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
    .gelu_erf = gelu<gelu_erf8>,
    .gelu_tanh = gelu<gelu_tanh8>,
    .decode_int4 = decode_int4,
    .gemm = &avx2_gemm_kernels,
    .quantized = &avx2_quantized_kernels,
    .int8 = &avx2_int8_kernels,
    .attention = &avx2_attention_kernels,
    .integer_attention = &avx2_integer_attention_kernels,
};

}  // namespace kimi::cpu
