// The blocked product that gemm, gemm_int4, grouped_gemm and fused_moe share: scattered rows of x against rows of a
// weight matrix.
//
// Few tokens take the weights straight from where they lie. More decode a panel of weight rows to float32 once and use
// it for up to kBlockT tokens. Both sum a product over k in the same order, so the batch size never changes a result.
#pragma once
#include <algorithm>

#include "cpu/kernels.h"
#include "ops/expert_weights.h"
#include "ops/gemm_int4.h"

namespace kimi::cpu {

constexpr int kBlockT = 66, kBlockRows = 64, kBlockK = 512;  // each of the two panels is about 130 KiB
constexpr int kPanelStride = kBlockK + 16;  // not a power of two, so that rows spread over the cache sets

// Weight matrix [out, in] in bf16.
struct Bf16Matrix {
  const bf16* w;
  int n_in;

  void dot(const Kernels& k, const float* const* x, int tokens, int row, int rows, int begin, int n,
           float* tile) const {
    k.dot_bf16(x, tokens, w + int64_t(row) * n_in + begin, n_in, rows, n, tile);
  }
  void decode(const Kernels& k, int row, int begin, int n, float* out) const {
    k.widen(w + int64_t(row) * n_in + begin, out, n);
  }
};

// Weight matrix [out, in] in packed INT4 with a scale per group of inputs.
struct Int4Matrix {
  const uint8_t* packed;
  const bf16* scale;
  int n_in;

  const uint8_t* packed_at(int row, int begin) const { return packed + (int64_t(row) * n_in + begin) / 2; }
  const bf16* scale_at(int row, int begin) const { return scale + (int64_t(row) * n_in + begin) / kInt4Group; }

  void dot(const Kernels& k, const float* const* x, int tokens, int row, int rows, int begin, int n,
           float* tile) const {
    k.dot_int4(x, tokens, packed_at(row, begin), n_in / 2, scale_at(row, begin), n_in / kInt4Group, rows, n, tile);
  }
  void decode(const Kernels& k, int row, int begin, int n, float* out) const {
    k.decode_int4(packed_at(row, begin), scale_at(row, begin), out, n / kInt4Group);
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

// Adds a tile of products to sums[t * kBlockRows + r].
inline void add_tile(const float* tile, int tokens, int rows, float* sums) {
  for (int t = 0; t < tokens; t++)
    for (int r = 0; r < rows; r++) sums[t * kBlockRows + r] += tile[t * kTileRows + r];
}

// sums[t * kBlockRows + r] += x[t][begin..begin + n) . W[row + r][begin..begin + n) for a tile of tokens.
template <class Matrix>
void add_direct(const Kernels& k, const float* const* x, int tokens, const Matrix& w, int row, int rows, int begin,
                int n, float* sums) {
  float tile[kTileT * kTileRows];
  const float* xs[kTileT] = {};
  for (int t = 0; t < tokens; t++) xs[t] = x[t] + begin;
  for (int r = 0; r < rows; r += kTileRows) {
    const int nr = std::min(kTileRows, rows - r);
    w.dot(k, xs, tokens, row + r, nr, begin, n, tile);
    add_tile(tile, tokens, nr, sums + r);
  }
}

// The same for up to kBlockT tokens, by way of two panels: decoded weights and copied x. Rows of x lie pages apart, too
// many for the processor's table of pages.
template <class Matrix>
void add_block(const Kernels& k, const float* const* x, int tokens, const Matrix& w, int row, int rows, int begin,
               int n, float* sums) {
  alignas(64) float w_panel[kBlockRows * kPanelStride], x_panel[kBlockT * kPanelStride];
  for (int r = 0; r < rows; r++) w.decode(k, row + r, begin, n, w_panel + r * kPanelStride);
  for (int t = 0; t < tokens; t++) std::copy_n(x[t] + begin, n, x_panel + t * kPanelStride);
  float tile[kTileT * kTileRows];
  for (int t = 0; t < tokens; t += kTileT) {
    const int nt = std::min(kTileT, tokens - t);
    const float* xs[kTileT] = {};
    for (int i = 0; i < nt; i++) xs[i] = x_panel + (t + i) * kPanelStride;
    for (int r = 0; r < rows; r += kTileRows) {
      const int nr = std::min(kTileRows, rows - r);
      k.dot_f32(xs, nt, w_panel + r * kPanelStride, kPanelStride, nr, n, tile);
      add_tile(tile, nt, nr, sums + t * kBlockRows + r);
    }
  }
}

// sums[t * kBlockRows + r] = x[t] . W[row + r] for t < tokens <= kBlockT, r < rows <= kBlockRows
template <class Matrix>
void matmul_block(const Kernels& k, const float* const* x, int tokens, const Matrix& w, int row, int rows,
                  float* sums) {
  std::fill(sums, sums + tokens * kBlockRows, 0.0f);
  const auto add = tokens <= kTileT ? add_direct<Matrix> : add_block<Matrix>;
  for (int begin = 0; begin < w.n_in; begin += kBlockK)
    add(k, x, tokens, w, row, rows, begin, std::min(kBlockK, w.n_in - begin), sums);
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

// out[t][row..row + rows) = x[t] . W for consecutive tokens, block by block. x and out are strided rows.
template <class Matrix>
void matmul_rows(const Kernels& k, const float* x, int64_t x_stride, int T, const Matrix& w, int row, int rows,
                 float* out, int64_t out_stride) {
  float sums[kBlockT * kBlockRows];
  const float* xs[kBlockT];
  for (int t = 0; t < T; t += kBlockT) {
    const int tokens = std::min(kBlockT, T - t);
    for (int i = 0; i < tokens; i++) xs[i] = x + (t + i) * x_stride;
    matmul_block(k, xs, tokens, w, row, rows, sums);
    for (int i = 0; i < tokens; i++) std::copy_n(sums + i * kBlockRows, rows, out + (t + i) * out_stride + row);
  }
}

}  // namespace kimi::cpu
