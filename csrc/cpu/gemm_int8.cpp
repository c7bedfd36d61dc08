#include "ops/gemm_int8.h"

#include <cmath>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

constexpr int kFewBytes = 1 << 16;   // of weights that a thread takes at once for few tokens
constexpr int kQuantized = 1 << 13;  // inputs that it rounds at once

int blocks_of(int n_in) { return (n_in + kInt8Block - 1) / kInt8Block; }

void quantize_group(const bf16* w, int8_t* q, bf16* scale) {
  float values[kInt8Group], largest = 0;
  bool finite = true;
  for (int i = 0; i < kInt8Group; i++) {
    values[i] = to_float(w[i]);
    finite = finite && std::isfinite(values[i]);
    largest = std::max(largest, std::fabs(values[i]));
  }
  *scale = finite ? to_bf16(largest / 127.0f) : bf16{0x7fc0};
  const float s = to_float(*scale);
  constexpr float kWhole = 3 << 22;  // a float of this size has no bits below the point: adding it rounds to even
  for (int i = 0; i < kInt8Group; i++)
    q[i] = s > 0 ? int8_t(std::clamp(values[i] / s + kWhole - kWhole, -127.0f, 127.0f)) : int8_t(0);
}

}  // namespace

size_t gemm_int8_workspace(const GemmInt8Params& p) {
  return (size_t(p.T) * p.N * blocks_of(p.n_in) + 1) * (sizeof(Int8Block) / sizeof(float));  // one to align the others
}

void gemm_int8(const GemmInt8Params& p) {
  const Int8Kernels& k = *kernels().int8;
  const uintptr_t workspace = reinterpret_cast<uintptr_t>(p.workspace);
  auto* const x = reinterpret_cast<Int8Block*>(workspace + -workspace % alignof(Int8Block));  // [N, in / kInt8Block, T]
  const int64_t blocks = int64_t(p.T) * blocks_of(p.n_in);                                    // of a matrix
  parallel_for(int64_t(p.T) * p.N, std::max(kQuantized / std::max(p.n_in, 1), 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t n = i / p.T, t = i % p.T;
      k.quantize(p.x + t * p.x_stride_t + n * p.x_stride_n, p.n_in, x + n * blocks + t, p.T);
    }
  });
  const bool few = p.T <= kFewTokens;
  const int64_t rows = few ? std::max(kFewBytes / std::max(p.n_in, 1) / 4 * 4, 4) : kInt8Rows;
  const int64_t strips = (p.n_out + rows - 1) / rows, chunks = few ? 1 : (p.T + kInt8Tokens - 1) / kInt8Tokens;
  parallel_for(p.N * strips * chunks, 1, [&](int64_t item, int64_t) {
    const int64_t n = item / (strips * chunks), row = item / chunks % strips * rows, chunk = item % chunks;
    const int64_t first = p.T * chunk / chunks, end = p.T * (chunk + 1) / chunks;  // all with more than a few tokens
    const int64_t weights = (n * p.n_out + row) * p.n_in;
    k.dot(x + n * blocks + first, p.T, int(end - first), p.weight + weights, p.weight_scale + weights / kInt8Group,
          int(std::min(rows, p.n_out - row)), p.n_in, p.out + first * p.out_stride_t + n * p.out_stride_n + row,
          p.out_stride_t);
  });
}

void quantize_int8(const QuantizeInt8Params& p) {
  constexpr int64_t kGroups = 1024;  // groups a thread takes at a time
  parallel_for(int64_t(p.n_out) * (p.n_in / kInt8Group), kGroups, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++)
      quantize_group(p.weight + g * kInt8Group, p.quantized + g * kInt8Group, p.weight_scale + g);
  });
}

}  // namespace kimi::cpu
