// Blocks of products of float32 matrices, for matmul and grouped_matmul. A block is computed by one thread: slabs of b
// are packed in strips for GemmKernels::multiply, the rows of a pass by them a panel at a time. An element is summed in
// slabs from K = 0 on, whatever the blocks are.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"
#include "ops/matmul.h"

namespace kimi::cpu {

constexpr int kSlab = 256;              // of K
constexpr int kPanelRows = 96;          // of a: 102 KiB, for the L2 cache
constexpr int kPanelColumns = 576;      // of b: 576 KiB, read from the L3 cache once a panel of a
constexpr int kBlockRows = 768;         // that share packed columns of b
constexpr int kUnit = 48;               // blocks end at multiples of it: whole strips and whole tiles of rows
constexpr int kRowLength = kSlab + 16;  // of a panel of a: not a power of two, so that rows spread over the cache sets
constexpr int64_t kNearRows = 2 * kSlab;  // rows of a that lie so close are read where they are
constexpr int kAhead = 16;                // rows of b that are asked for ahead

// An axis cut in almost equal blocks of at most `most`, a multiple of kUnit.
struct Cut {
  int size, most;
  int count = (size + most - 1) / most;

  int begin(int64_t i) const { return int(std::min<int64_t>(size, (size + kUnit - 1) / kUnit * i / count * kUnit)); }
  int length(int64_t i) const { return begin(i + 1) - begin(i); }
};

struct Panels {
  alignas(64) float a[kPanelRows * kRowLength], b[kPanelColumns * kSlab], edge[kPanelRows * kStrip];
};

// panel[i * kStrip + c] = b(i, c), 0 beyond the columns
inline void pack_strip(const Kernels& k, const FloatMatrix& b, int depth, int columns, float* panel) {
  if (columns < kStrip) std::fill_n(panel, depth * kStrip, 0.0f);
  if (b.transposed)
    k.attention->transpose(b.data, b.stride, columns, depth, panel, kStrip);
  else if (columns == kStrip)
    for (int i = 0; i < depth; i++) {
      __builtin_prefetch(b.at(i + kAhead, 0)), __builtin_prefetch(b.at(i + kAhead, kStrip - 1));
      std::memcpy(panel + i * kStrip, b.at(i, 0), kStrip * sizeof(float));  // not a call, as a copy of any length is
    }
  else
    for (int i = 0; i < depth; i++) std::copy_n(b.at(i, 0), columns, panel + i * kStrip);
}

// Rows of a [rows, depth], each contiguous: where they are, or copied to the panel.
inline FloatMatrix rows_of(const Kernels& k, const FloatMatrix& a, int rows, int depth, float* panel) {
  if (a.transposed)
    k.attention->transpose(a.data, a.stride, depth, rows, panel, kRowLength);
  else if (std::abs(a.stride) <= kNearRows)
    return a;
  else
    for (int r = 0; r < rows; r++) std::copy_n(a.at(r, 0), depth, panel + r * kRowLength);
  return {panel, kRowLength, false};
}

// out [m, n] = a [m, K] @ b [K, n] for n <= kPanelColumns; with `lower` only what lies on and below the diagonal, and
// something above it.
inline void multiply_block(const Kernels& k, const FloatMatrix& a, const FloatMatrix& b, int m, int n, int K,
                           float* out, int64_t out_stride, Panels& panels, bool lower = false) {
  for (int r = 0; r < m; r++) std::fill_n(out + r * out_stride, n, 0.0f);
  for (int begin = 0; begin < K; begin += kSlab) {
    const int depth = std::min(kSlab, K - begin);
    for (int c = 0; c < n; c += kStrip)
      pack_strip(k, b.from(begin, c), depth, std::min(kStrip, n - c), panels.b + c * depth);
    for (int r = 0; r < m; r += kPanelRows) {
      const int rows = std::min(kPanelRows, m - r), columns = lower ? std::min(n, r + rows) : n;
      const FloatMatrix x = rows_of(k, a.from(r, begin), rows, depth, panels.a);
      float* const sums = out + r * out_stride;
      int c = 0;
      for (; c + kStrip <= columns; c += kStrip)
        k.gemm->multiply(x.data, x.stride, rows, panels.b + c * depth, depth, sums + c, out_stride);
      if (c == columns) continue;
      std::fill_n(panels.edge, rows * kStrip, 0.0f);
      k.gemm->multiply(x.data, x.stride, rows, panels.b + c * depth, depth, panels.edge, kStrip);
      for (int t = 0; t < rows; t++)
        for (int j = c; j < columns; j++) sums[t * out_stride + j] += panels.edge[t * kStrip + j - c];
    }
  }
}

}  // namespace kimi::cpu
