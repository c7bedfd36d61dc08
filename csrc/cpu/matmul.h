// The product that gemm, batched_gemm, gemm_int4, grouped_gemm and fused_moe share: scattered rows of x against rows of
// a weight matrix.
//
// Few tokens take the weights straight from where they lie. More copy x to a panel, strips of weights are decoded to
// float32 and used for all of them. Each of the two ways has one order of sums, whatever the tokens beside one are.
#pragma once
#include <algorithm>

#include "cpu/kernels.h"
#include "ops/expert_weights.h"
#include "ops/gemm_int4.h"

namespace kimi::cpu {

constexpr int kBlockT = 96, kBlockRows = 128, kBlockK = 256;  // the panel of x is 104 KiB, a strip of weights 16
constexpr int kFewRows = 32;  // of a block with few tokens, read at once: small, so that threads end together
constexpr int kPanelStride = kBlockK + 16;  // not a power of two, so that rows spread over the cache sets

// Weight matrix [out, in] in bf16.
struct Bf16Matrix {
  const bf16* w;
  int n_in;

  void few(const Kernels& k, const float* const* x, int tokens, int row, int rows, float* sums) const {
    k.gemm->few_bf16(x, tokens, w + int64_t(row) * n_in, n_in, rows, n_in, sums, kBlockRows);
  }
  void pack(const Kernels& k, int row, int rows, int begin, int n, int64_t ahead, float* panel) const {
    k.gemm->pack_bf16(w + int64_t(row) * n_in + begin, n_in, ahead, rows, n, panel);
  }
};

// Weight matrix [out, in] in packed INT4 with a scale per group of inputs.
struct Int4Matrix {
  const uint8_t* packed;
  const bf16* scale;
  int n_in;

  const uint8_t* packed_at(int row, int begin) const { return packed + (int64_t(row) * n_in + begin) / 2; }
  const bf16* scale_at(int row, int begin) const { return scale + (int64_t(row) * n_in + begin) / kInt4Group; }

  void few(const Kernels& k, const float* const* x, int tokens, int row, int rows, float* sums) const {
    k.gemm->few_int4(x, tokens, packed_at(row, 0), n_in / 2, scale_at(row, 0), n_in / kInt4Group, rows, n_in, sums,
                     kBlockRows);
  }
  void pack(const Kernels& k, int row, int rows, int begin, int n, int64_t ahead, float* panel) const {
    k.gemm->pack_int4(packed_at(row, begin), n_in / 2, ahead / 2, scale_at(row, begin), n_in / kInt4Group, rows, n,
                      panel);
  }
};

// Calls body(matrix) with expert e in the format it is stored in.
template <class Body>
void with_expert(const ExpertWeights& w, int e, Body&& body) {
  if (w.scale)
    body(Int4Matrix{static_cast<const uint8_t*>(w.weight[e]), w.scale[e], w.n_in});
  else
    body(Bf16Matrix{static_cast<const bf16*>(w.weight[e]), w.n_in});
}

// sums[t * kBlockRows + r] = x[t] . W[row + r] for t < tokens <= kBlockT, r < rows <= kBlockRows. Rows of x lie pages
// apart, too many for the processor's table of pages: hence the copy.
template <class Matrix>
void multiply_block(const Kernels& k, const float* const* x, int tokens, const Matrix& w, int row, int rows,
                    float* sums) {
  alignas(64) float x_panel[kBlockT * kPanelStride], panel[kBlockK * kStrip];
  std::fill(sums, sums + tokens * kBlockRows, 0.0f);
  for (int begin = 0; begin < w.n_in; begin += kBlockK) {
    const int n = std::min(kBlockK, w.n_in - begin);
    for (int t = 0; t < tokens; t++) std::copy_n(x[t] + begin, n, x_panel + t * kPanelStride);
    for (int r = 0; r < rows; r += kStrip) {
      const int64_t ahead = r + kStrip < rows ? int64_t(kStrip) * w.n_in : kBlockK - int64_t(r) * w.n_in;
      w.pack(k, row + r, std::min(kStrip, rows - r), begin, n, ahead, panel);
      for (int t = tokens * r / rows; t < tokens * (r + kStrip) / rows && t < tokens; t++)  // what is copied next
        for (int i = 0; i < kBlockK; i += 16) __builtin_prefetch(x[t] + begin + kBlockK + i, 0, 2);
      k.gemm->multiply(x_panel, kPanelStride, tokens, panel, n, sums + r, kBlockRows);
    }
  }
}

// The same by the way that suits the number of tokens.
template <class Matrix>
void matmul_block(const Kernels& k, const float* const* x, int tokens, const Matrix& w, int row, int rows,
                  float* sums) {
  if (tokens <= kFewTokens)
    w.few(k, x, tokens, row, rows, sums);
  else
    multiply_block(k, x, tokens, w, row, rows, sums);
}

// Rows of inputs, and as integers where they have been quantized.
struct Inputs {
  const float* x;
  int64_t stride;
  const char* quantized = nullptr;
  int64_t quantized_stride = 0;  // bytes
  int digits = 0;
};

// sums[t * kBlockRows + r] = x[index[t]] . W_e[row + r], as matmul_block has it, by integers where x has them.
inline void matmul_expert(const Kernels& k, const Inputs& in, const int64_t* index, int tokens, const ExpertWeights& w,
                          int e, int row, int rows, float* sums) {
  if (in.quantized) {
    const void* xs[kBlockT];
    for (int t = 0; t < tokens; t++) xs[t] = in.quantized + index[t] * in.quantized_stride;
    const Int4Matrix m{static_cast<const uint8_t*>(w.weight[e]), w.scale[e], w.n_in};
    k.quantized->dot(xs, tokens, in.digits, m.packed_at(row, 0), w.n_in / 2, m.scale_at(row, 0), w.n_in / kInt4Group,
                     rows, w.n_in, sums, kBlockRows);
    return;
  }
  const float* xs[kBlockT];
  for (int t = 0; t < tokens; t++) xs[t] = in.x + index[t] * in.stride;
  with_expert(w, e, [&](const auto& matrix) { matmul_block(k, xs, tokens, matrix, row, rows, sums); });
}

// The blocks of a product of T consecutive tokens with n_out weight rows. Tokens are shared out evenly, so that all
// take the same way.
struct Blocks {
  int T, n_out;
  int height = T <= kFewTokens ? kFewRows : kBlockRows;
  int tokens = (T + kBlockT - 1) / kBlockT, rows = (n_out + height - 1) / height;

  int64_t count() const { return int64_t(tokens) * rows; }
  int token(int64_t block) const { return int(int64_t(T) * block / tokens); }
};

// Block i of out[t] = x[t] . W, of consecutive tokens. x and out are strided rows.
template <class Matrix>
void matmul_rows(const Kernels& k, const float* x, int64_t x_stride, const Blocks& blocks, int64_t i, const Matrix& w,
                 float* out, int64_t out_stride) {
  float sums[kBlockT * kBlockRows];
  const float* xs[kBlockT];
  const int first = blocks.token(i % blocks.tokens), tokens = blocks.token(i % blocks.tokens + 1) - first;
  const int row = int(i / blocks.tokens) * blocks.height, rows = std::min(blocks.height, blocks.n_out - row);
  for (int t = 0; t < tokens; t++) xs[t] = x + (first + t) * x_stride;
  matmul_block(k, xs, tokens, w, row, rows, sums);
  for (int t = 0; t < tokens; t++) std::copy_n(sums + t * kBlockRows, rows, out + (first + t) * out_stride + row);
}

}  // namespace kimi::cpu
