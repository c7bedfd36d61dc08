// Attention's products in integers for AVX2. As in float32 a lane is a query, and six elements of rows are broadcast
// against 16 lanes; here an element is a pair, `vpmaddwd` multiplies it, and 12 sums in registers take two instructions
// for 16 products where a multiply-add takes two for 16: but four of them a cycle, not two.
#include <immintrin.h>

#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

static_assert(kLanes == 16 && kIntegerStep == 16, "two registers of lanes, one of inputs");

__m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
void store(void* at, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(at), v); }

// What is behind the whole steps of a row, and zeros.
__m256i load_rest(const bf16* x, int n) {
  bf16 some[kIntegerStep] = {};
  __builtin_memcpy(some, x, n * sizeof(bf16));
  return load(some);
}

__m256 even(__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
__m256 odd(__m256i x) { return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff0000))); }

// x * factor rounded to an integer of 16 bits, in the low half of each lane, 0 if that is not finite. What lies above
// is of no use.
__m256i nearest(__m256 x, __m256 factor) {
  return _mm256_castps_si256(_mm256_fmadd_ps(x, factor, _mm256_set1_ps(0x1.8p23f)));
}

__m256i join(__m256i low, __m256i high) { return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa); }

float largest(const bf16* x, int n) {
  const __m256i magnitude = _mm256_set1_epi16(0x7fff);
  __m256i most = _mm256_setzero_si256();
  int i = 0;
#pragma GCC unroll 4
  for (; i + kIntegerStep <= n; i += kIntegerStep)
    most = _mm256_max_epi16(most, _mm256_and_si256(load(x + i), magnitude));
  if (i < n) most = _mm256_max_epi16(most, _mm256_and_si256(load_rest(x + i, n - i), magnitude));
  // the smallest of 8 words is one instruction
  const __m128i half = _mm_max_epi16(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  const int bits = 0xffff & ~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1))));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits << 16)));
}

__m256i quantize(__m256i x, __m256 factor) { return join(nearest(even(x), factor), nearest(odd(x), factor)); }

void store_pairs(int16_t* pairs, __m256i first, __m256i second) {
  const __m256i low = _mm256_unpacklo_epi16(first, second), high = _mm256_unpackhi_epi16(first, second);
  store(pairs, _mm256_permute2x128_si256(low, high, 0x20));
  store(pairs + 16, _mm256_permute2x128_si256(low, high, 0x31));
}

template <bool kPairs>
void quantize_both(const bf16* a, const bf16* b, const float factor[2], int n, int16_t* a_q, int16_t* b_q,
                   int16_t* pairs) {
  const __m256 f = _mm256_set1_ps(factor[0]), g = _mm256_set1_ps(factor[1]);
  const auto step = [&](int i, __m256i x, __m256i y) {
    const __m256i u = quantize(x, f), v = quantize(y, g);
    store(a_q + i, u);
    store(b_q + i, v);
    if (kPairs) store_pairs(pairs + 2 * i, u, v);
  };
  int i = 0;
  for (; i + kIntegerStep <= n; i += kIntegerStep) step(i, load(a + i), load(b + i));
  if (i < n) step(i, load_rest(a + i, n - i), load_rest(b + i, n - i));
}

void quantize_rows(const bf16* const x[2], const float factor[2], int n, int16_t* const q[2], int16_t* pairs) {
  (pairs ? quantize_both<true> : quantize_both<false>)(x[0], x[1], factor, n, q[0], q[1], pairs);
}

void quantize_lanes(const float* x, const float* factor, int n, int16_t* q, float* d) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  for (int r = 0; r < kLanes; r += 8) {
    const auto row = [&](int i) {
      if (i == n) return _mm256_setzero_ps();
      return _mm256_mul_ps(_mm256_broadcast_ss(factor + i), _mm256_loadu_ps(x + i * kLanes + r));
    };
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, most = sum[0];
    for (int i = 0; i < n; i += 2)
      for (int h = 0; h < 2; h++) {
        const __m256 magnitude = _mm256_andnot_ps(sign, row(i + h));
        sum[h] = _mm256_add_ps(sum[h], magnitude);
        most = _mm256_max_ps(most, magnitude);
      }
    const __m256 by_sum = _mm256_mul_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_set1_ps(1 / kLaneSum));
    const __m256 scale = _mm256_max_ps(_mm256_mul_ps(most, _mm256_set1_ps(1.0f / 32767)), by_sum);  // by_sum if NaN
    const __m256 inverse = _mm256_div_ps(_mm256_set1_ps(1), scale);
    _mm256_storeu_ps(d + r, scale);
    for (int i = 0; i < n; i += 2)
      store(q + i * kLanes + 2 * r, join(nearest(row(i), inverse), nearest(row(i + 1), inverse)));
  }
}

// low, high[i][r] += sum_k b[i * stride_i + k * stride_k] . a[k][r] over pairs, for i < kCount
template <int kCount>
[[gnu::always_inline]] inline void add_pairs(const int16_t* a, const int16_t* b, int64_t stride_i, int64_t stride_k,
                                             int pairs, __m256i (&low)[kCount], __m256i (&high)[kCount]) {
  for (int k = 0; k < pairs; k++) {
    const __m256i first = load(a + k * 2 * kLanes), second = load(a + k * 2 * kLanes + kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kCount; i++) {
      // vbroadcastss is a load alone, vpbroadcastd takes one of the four vector units as well
      const auto* pair = reinterpret_cast<const float*>(b + i * stride_i + k * stride_k);
      const __m256i w = _mm256_castps_si256(_mm256_broadcast_ss(pair));
      // vpaddd in place: the compiler would reorder the sums, spill them and move them about
      asm("vpaddd %1, %0, %0" : "+x"(low[i]) : "x"(_mm256_madd_epi16(w, first)));
      asm("vpaddd %1, %0, %0" : "+x"(high[i]) : "x"(_mm256_madd_epi16(w, second)));
    }
  }
}

template <int kCount>
[[gnu::always_inline]] inline void clear(__m256i (&low)[kCount], __m256i (&high)[kCount]) {
#pragma GCC unroll 6
  for (int i = 0; i < kCount; i++) low[i] = high[i] = _mm256_setzero_si256();
}

// Of a run of n inputs. What will be needed next is asked for run by run: all at once would take all miss buffers, and
// the loads behind it wait.
template <int kCount>
void score_tile(const int16_t* q, const float* query_scale, const int16_t* rows, int64_t stride, const float* row_scale,
                int n, bool add, const bf16* const* ahead, int begin, float* out) {
  constexpr int kLine = 64 / sizeof(bf16);
  if (ahead)
    for (int j = 0; j < kCount; j++)
      for (int i = 0; i < n; i += kLine) _mm_prefetch(ahead[j] + begin + i, _MM_HINT_T1);
  __m256i low[kCount], high[kCount];
  clear(low, high);
  add_pairs<kCount>(q, rows, stride, 2, n / 2, low, high);
  const __m256 first = _mm256_loadu_ps(query_scale), second = _mm256_loadu_ps(query_scale + 8);
#pragma GCC unroll 6
  for (int i = 0; i < kCount; i++) {
    float* at = out + i * kLanes;
    const __m256 d = _mm256_broadcast_ss(row_scale + i), none = _mm256_setzero_ps();
    const __m256 u = _mm256_mul_ps(d, _mm256_cvtepi32_ps(low[i])), v = _mm256_mul_ps(d, _mm256_cvtepi32_ps(high[i]));
    _mm256_storeu_ps(at, _mm256_fmadd_ps(first, u, add ? _mm256_loadu_ps(at) : none));
    _mm256_storeu_ps(at + 8, _mm256_fmadd_ps(second, v, add ? _mm256_loadu_ps(at + 8) : none));
  }
}

void scores(const int16_t* q, const float* query_scale, const int16_t* rows, int64_t stride, const float* row_scale,
            int count, int n, bool add, const bf16* const* ahead, float* out) {
  for (int begin = 0; begin < n; begin += kIntegerRun, query_scale += kLanes, add = true) {
    const int size = n - begin < kIntegerRun ? n - begin : kIntegerRun;
    const auto run = [&](auto tile, int j) {
      tile(q + begin * kLanes, query_scale, rows + j * stride + begin, stride, row_scale + j, size, add,
           ahead ? ahead + j : nullptr, begin, out + j * kLanes);
    };
    int j = 0;
    for (; j + 6 <= count; j += 6) run(score_tile<6>, j);
    for (; j + 2 <= count; j += 2) run(score_tile<2>, j);
    if (j < count) run(score_tile<1>, j);
  }
}

template <int kCount>
void value_tile(const int16_t* w, const float* d, const int16_t* pairs, int64_t stride, int count, const float* factor,
                float* out) {
  __m256i low[kCount], high[kCount];
  clear(low, high);
  add_pairs<kCount>(w, pairs, 2, stride, count, low, high);
  const __m256 first = _mm256_loadu_ps(d), second = _mm256_loadu_ps(d + 8);
  const __m256 f = _mm256_loadu_ps(factor), g = _mm256_loadu_ps(factor + 8);
#pragma GCC unroll 6
  for (int i = 0; i < kCount; i++) {
    float* at = out + i * kLanes;
    const __m256 u = _mm256_mul_ps(f, _mm256_loadu_ps(at)), v = _mm256_mul_ps(g, _mm256_loadu_ps(at + 8));
    _mm256_storeu_ps(at, _mm256_fmadd_ps(first, _mm256_cvtepi32_ps(low[i]), u));
    _mm256_storeu_ps(at + 8, _mm256_fmadd_ps(second, _mm256_cvtepi32_ps(high[i]), v));
  }
}

void add_values(const int16_t* weights, const float* d, const int16_t* pairs, int64_t stride, int count, int n,
                const float* factor, float* out) {
  const auto add = [&](auto tile, int c) { tile(weights, d, pairs + 2 * c, stride, count, factor, out + c * kLanes); };
  int c = 0;
  for (; c + 6 <= n; c += 6) add(value_tile<6>, c);
  for (; c + 2 <= n; c += 2) add(value_tile<2>, c);
  if (c < n) add(value_tile<1>, c);
}

}  // namespace

const IntegerAttentionKernels avx2_integer_attention_kernels = {
    .largest = largest,
    .quantize_rows = quantize_rows,
    .quantize_lanes = quantize_lanes,
    .scores = scores,
    .add_values = add_values,
};

}  // namespace kimi::cpu
