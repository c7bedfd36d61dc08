// What the grouped GEMM kernels take, and how a block finds its work: rows sorted by expert, cut into pieces of N.
#pragma once

#include <algorithm>

#include "cuda/int4.cuh"
#include "ops/expert_weights.h"

namespace kimi::cuda {

KIMI_BOTH constexpr int parts_of(int n, int size) { return (n + size - 1) / size; }

// One projection of all experts, or one matrix.
struct Projection {
  const void* const* weights = nullptr;  // [E], or null
  const bf16* const* scales = nullptr;   // [E], of INT4
  const void* weight = nullptr;          // the one matrix
  const bf16* scale = nullptr;
  int n_out, n_in;
  bool int4;  // or bf16

  PTX_FN const void* weight_of(int e) const { return weights ? weights[e] : weight; }
  PTX_FN const bf16* scale_of(int e) const { return scales ? scales[e] : scale; }
};

inline Projection projection(const ExpertWeights& w) {
  return {.weights = w.weight, .scales = w.scale, .n_out = w.n_out, .n_in = w.n_in, .int4 = w.scale != nullptr};
}

// Row i of the M sorted rows is x[i], or x[pair[i] / K] times the router weight of the pair where it says SwiGLU.
struct Grouped {
  const bf16* x;
  int64_t x_stride;
  const int32_t* offsets = nullptr;  // [E + 1]; null: the one matrix has all rows
  const int32_t* pair = nullptr;     // [M] or null
  const float* weights = nullptr;    // [M], by pair
  int K = 0;
  Projection w[2];  // one matrix; or gate and up
  bf16* out;        // [M, n_out]
  int64_t out_stride;
  int M, E;
  bool x_vector, out_vector;  // rows allow 16-byte access
};

inline bool rows_aligned(const bf16* p, int64_t stride, int width) {
  return aligned16(p) && stride % 8 == 0 && width % 8 == 0;
}

// Rows of expert e; whatever the offsets hold, inside the array.
PTX_FN int2 rows_of(const Grouped& p, int e) {
  if (!p.offsets) return {0, p.M};
  const int begin = min(max(p.offsets[e], 0), p.M);
  return {begin, min(max(p.offsets[e + 1], begin), p.M)};
}

// table[e] = pieces of N rows before expert e, for all e up to E. By the whole block; `part` is scratch.
template <int N, int Threads>
PTX_FN void count_pieces(const Grouped& p, int* table, int (&part)[Threads / kWarp + 1]) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (threadIdx.x == 0) part[Threads / kWarp] = table[0] = 0;
  for (int first = 0; first < p.E; first += Threads) {
    const int e = first + int(threadIdx.x);
    const int2 rows = e < p.E ? rows_of(p, e) : int2{0, 0};
    int sum = parts_of(rows.y - rows.x, N);
#pragma unroll
    for (int d = 1; d < kWarp; d *= 2) {
      const int below = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += below;
    }
    if (lane == kWarp - 1) part[warp] = sum;
    __syncthreads();
    sum += part[Threads / kWarp];
    for (int w = 0; w < warp; ++w) sum += part[w];
    if (e < p.E) table[e + 1] = sum;
    __syncthreads();
    if (threadIdx.x == Threads - 1) part[Threads / kWarp] = sum;
  }
  __syncthreads();
}

struct Piece {
  int expert, first, rows;
};

template <int N>
PTX_FN Piece find_piece(const Grouped& p, const int* table, int piece) {
  int low = 0, high = p.E - 1;  // table[low] <= piece < table[high + 1]
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table[middle] <= piece)
      low = middle;
    else
      high = middle - 1;
  }
  const int2 rows = rows_of(p, low);
  const int first = rows.x + (piece - table[low]) * N;
  return {low, first, max(0, min(N, rows.y - first))};
}

// Rows that belong to no expert, of the grid's blocks together.
PTX_FN void zero_rows_of_none(const Grouped& p) {
  if (!p.offsets) return;
  const int begin = min(max(p.offsets[p.E], 0), p.M), width = p.w[0].n_out;
  for (int row = begin + int(blockIdx.x); row < p.M; row += gridDim.x)
    for (int i = threadIdx.x; i < width; i += blockDim.x) p.out[row * p.out_stride + i] = bf16{0};
}

PTX_FN float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }

// The plain kernels, which grouped_gemm.cu holds.
void run_grouped(const Grouped& p, Stream stream);

}  // namespace kimi::cuda
