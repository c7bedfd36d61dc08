#include "ops/attention.h"

#include <algorithm>

#include "cuda/device.cuh"

namespace kimi::cuda {
namespace {

using Params = AttentionParams<bf16>;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr float kLog2E = 1.4426950408889634f;

// Consecutive queries of one sequence, and its tokens.
struct Queries {
  int first, count;  // none if count is 0
  int key, keys;
};

// The block of at most `rows` queries with this number, blocks counted sequence by sequence. A sequence that lies not
// within the arrays has none.
PTX_FN Queries find_queries(const Params& p, int rows, int number) {
  for (int b = 0; b < p.B; ++b) {
    const int begin = p.cu_seqlens[b], end = p.cu_seqlens[b + 1];
    if (begin < 0 || begin > end || end > p.T) continue;
    const int blocks = (end - begin) / rows + ((end - begin) % rows != 0);
    if (number < blocks) return {begin + number * rows, min(rows, end - begin - number * rows), begin, end - begin};
    number -= blocks;
  }
  return {};
}

// Any shape: a block a query and head, 128 keys at a time, a thread a key for the scores and columns for the values.
__global__ void __launch_bounds__(kThreads) attention_plain_kernel(Params p) {
  constexpr int kPerThread = kMaxAttentionWidth / kThreads;  // columns
  GPU_SHARED(weight, float[kThreads]);
  GPU_SHARED(part, float[kWarps]);
  const int n = blockIdx.x % p.N;
  const Queries at = find_queries(p, 1, blockIdx.x / p.N);
  if (at.count == 0) return;
  const bf16* q = p.q + at.first * p.q_stride_t + n * p.q_stride_n;
  const bf16* k = p.k + at.key * p.k_stride_t + n * p.k_stride_n;
  const bf16* v = p.v + at.key * p.v_stride_t + n * p.v_stride_n;
  float value[kPerThread] = {}, largest = -INFINITY, sum = 0;
  for (int first = 0; first < at.keys; first += kThreads) {
    const int count = min(kThreads, at.keys - first), j = threadIdx.x;
    float score = j < count ? 0.0f : -INFINITY;
    if (j < count) {
      const bf16* key = k + (first + j) * p.k_stride_t;
      for (int i = 0; i < p.D; ++i) score += to_float(q[i]) * to_float(key[i]);
      score *= p.scale * kLog2E;
    }
    // its barriers also part the weights of this tile from the use of those of the last
    const float top = fmaxf(largest, block_reduce<kThreads>(score, -INFINITY, part, Max()));
    const float base = top == -INFINITY ? 0.0f : top, shrink = ptx::exp2_approx(largest - base);
    weight[j] = j < count ? ptx::exp2_approx(score - base) : 0.0f;
    sum = sum * shrink + block_reduce<kThreads>(weight[j], 0.0f, part, Add());
    largest = top;
#pragma unroll
    for (int c = 0; c < kPerThread; ++c) {
      const int column = c * kThreads + threadIdx.x;
      if (column >= p.D) break;
      value[c] *= shrink;
      for (int i = 0; i < count; ++i) value[c] += weight[i] * to_float(v[(first + i) * p.v_stride_t + column]);
    }
  }
  bf16* out = p.out + (int64_t(at.first) * p.N + n) * p.D;
#pragma unroll
  for (int c = 0; c < kPerThread; ++c) {
    const int column = c * kThreads + threadIdx.x;
    if (column < p.D) out[column] = to_bf16(sum == 0 ? 0.0f : value[c] / sum);
  }
}

// ---- heads of up to 80 columns, by tensor cores ----
// A block takes 128 queries of one head, each of its 4 warps 32 of them, and 64 keys at a time; the next 64 are loaded
// meanwhile. In shared memory a row is 80 columns, zeros behind D, and 16 bytes that part the banks: the same columns
// of 8 rows lie in different ones.
constexpr int kRows = 128, kWarpRows = kRows / kWarps, kKeys = 64;
constexpr int kColumns = 80, kEights = kColumns / 8, kRowBytes = kColumns * sizeof(bf16) + 16;
constexpr int kQBytes = kRows * kRowBytes, kTileBytes = kKeys * kRowBytes;
constexpr int kSharedBytes = kQBytes + 2 * 2 * kTileBytes;  // q, then k and v of two tiles

PTX_FN int tile_at(int row, int eight) { return row * kRowBytes + eight * 16; }

// Rows past `rows` and columns past D become zero: a weight of 0 times what lies there must be 0.
template <int Rows>
PTX_FN void load_tile(unsigned char* tile, const bf16* from, int64_t stride, int rows, int D) {
#pragma unroll
  for (int i = threadIdx.x; i < Rows * kEights; i += kThreads) {
    const int row = i / kEights, eight = i % kEights;
    const bool there = row < rows && eight * 8 < D;
    ptx::cp_async16(tile + tile_at(row, eight), there ? from + row * stride + eight * 8 : from, there ? 16 : 0);
  }
}

// score = q k^T of a warp's rows. The lane's part of score[m][j]: queries 16 m + lane / 4 and + 8, keys
// 8 j + lane % 4 * 2 and + 1.
PTX_FN void scores(float (&score)[2][8][4], const unsigned char* q, const unsigned char* k) {
  const int lane = threadIdx.x % kWarp;
  q += tile_at(lane % 16, lane / 16), k += tile_at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int i = 0; i < kColumns / 16; ++i) {
    unsigned a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) ptx::ldmatrix_x4(a[m], q + tile_at(16 * m, 2 * i));
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      unsigned r[4];
      ptx::ldmatrix_x4(r, k + tile_at(8 * j, 2 * i));
#pragma unroll
      for (int m = 0; m < 2; ++m)
        ptx::mma_m16n8k16(score[m][j], a[m], {r[0], r[1]}), ptx::mma_m16n8k16(score[m][j + 1], a[m], {r[2], r[3]});
    }
  }
}

// value += weight v. value[m][j]: queries as for the scores, columns 8 j + lane % 4 * 2 and + 1.
PTX_FN void add_values(float (&value)[2][kEights][4], const unsigned (&weight)[2][4][4], const unsigned char* v) {
  const int lane = threadIdx.x % kWarp;
  v += tile_at(lane % 16, lane / 16);
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i)
#pragma unroll
    for (int j = 0; j < kEights; j += 2) {
      unsigned r[4];
      ptx::ldmatrix_x4_trans(r, v + tile_at(16 * i, j));
#pragma unroll
      for (int m = 0; m < 2; ++m)
        ptx::mma_m16n8k16(value[m][j], weight[m][i], {r[0], r[1]}),
            ptx::mma_m16n8k16(value[m][j + 1], weight[m][i], {r[2], r[3]});
    }
}

// The running softmax of a lane's four rows [m][h]: queries 16 m + 8 h + lane / 4. The four lanes of a row share its
// largest score; each adds up its own weights.
struct Softmax {
  float largest[2][2], sum[2][2];
};

// Scores become weights, as bf16 in the layout of an mma operand; values so far shrink by what the largest score grew.
PTX_FN void weigh(float (&score)[2][8][4], float scale, Softmax& s, float (&value)[2][kEights][4],
                  unsigned (&weight)[2][4][4]) {
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = s.largest[m][h];
#pragma unroll
      for (int j = 0; j < 8; ++j) top = fmaxf(top, fmaxf(score[m][j][2 * h], score[m][j][2 * h + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float base = top == -INFINITY ? 0.0f : top * scale;
      const float shrink = ptx::exp2_approx(s.largest[m][h] * scale - base);
      s.largest[m][h] = top, s.sum[m][h] *= shrink;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float low = ptx::exp2_approx(fmaf(score[m][j][2 * h], scale, -base));
        const float high = ptx::exp2_approx(fmaf(score[m][j][2 * h + 1], scale, -base));
        s.sum[m][h] += low + high;
        weight[m][j / 2][j % 2 * 2 + h] = ptx::pack_bf16(low, high);
      }
#pragma unroll
      for (int j = 0; j < kEights; ++j) value[m][j][2 * h] *= shrink, value[m][j][2 * h + 1] *= shrink;
    }
}

// Writes the warp's results in rows of 16 bytes a lane, ordered by way of the rows of q that only this warp has read.
PTX_FN void store_values(const Params& p, const Queries& at, int n, int row, const Softmax& s,
                         const float (&value)[2][kEights][4], unsigned char* memory) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = s.sum[m][h] + __shfl_xor_sync(~0u, s.sum[m][h], 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float scale = sum == 0 ? 0.0f : 1.0f / sum;
#pragma unroll
      for (int j = 0; j < kEights; ++j)
        *reinterpret_cast<unsigned*>(memory + tile_at(row + 16 * m + 8 * h + lane / 4, j) + lane % 4 * 4) =
            ptx::pack_bf16(value[m][j][2 * h] * scale, value[m][j][2 * h + 1] * scale);
    }
  __syncwarp();
  const int eights = p.D / 8;
  for (int i = lane; i < kWarpRows * eights; i += kWarp) {
    const int query = row + i / eights, eight = i % eights;
    if (query >= at.count) break;
    *reinterpret_cast<uint4*>(p.out + (int64_t(at.first + query) * p.N + n) * p.D + eight * 8) =
        *reinterpret_cast<const uint4*>(memory + tile_at(query, eight));
  }
}

__global__ void __launch_bounds__(kThreads, 2) attention_kernel(Params p, float scale) {
  GPU_SHARED_DYNAMIC(memory, 128);
  const int n = blockIdx.x % p.N, row = threadIdx.x / kWarp * kWarpRows;
  const Queries at = find_queries(p, kRows, blockIdx.x / p.N);
  if (at.count == 0) return;
  const bf16* keys = p.k + at.key * p.k_stride_t + n * p.k_stride_n;
  const bf16* values = p.v + at.key * p.v_stride_t + n * p.v_stride_n;
  const auto place = [&](int tile) { return memory + kQBytes + tile % 2 * 2 * kTileBytes; };  // of k; v follows
  const auto load = [&](int tile) {
    const int first = tile * kKeys, rows = at.keys - first;
    if (rows > 0) {
      load_tile<kKeys>(place(tile), keys + first * p.k_stride_t, p.k_stride_t, rows, p.D);
      load_tile<kKeys>(place(tile) + kTileBytes, values + first * p.v_stride_t, p.v_stride_t, rows, p.D);
    }
    ptx::cp_async_commit();  // also an empty group: they are counted
  };
  load_tile<kRows>(memory, p.q + at.first * p.q_stride_t + n * p.q_stride_n, p.q_stride_t, at.count, p.D);
  load(0);

  float value[2][kEights][4] = {};
  Softmax s{{{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}}, {}};
  for (int tile = 0; tile * kKeys < at.keys; ++tile) {
    load(tile + 1);
    ptx::cp_async_wait<1>();
    __syncthreads();  // this tile is there for all
    float score[2][8][4] = {};
    unsigned weight[2][4][4];
    scores(score, memory + tile_at(row, 0), place(tile));
    const int rows = at.keys - tile * kKeys;
    if (rows < kKeys) {
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (8 * j + int(threadIdx.x) % 4 * 2 + i % 2 >= rows) score[0][j][i] = score[1][j][i] = -INFINITY;
    }
    weigh(score, scale, s, value, weight);
    add_values(value, weight, place(tile) + kTileBytes);
    __syncthreads();  // nobody still reads what is loaded next
  }
  store_values(p, at, n, row, s, value, memory);
}

}  // namespace

void attention(const Params& p, Stream stream) {
  const auto vectors = [](const bf16* data, int64_t stride_t, int64_t stride_n) {
    return aligned16(data) && stride_t % 8 == 0 && stride_n % 8 == 0;
  };
  const bool fast = p.D % 8 == 0 && p.D <= kColumns && p.scale > 0 && vectors(p.q, p.q_stride_t, p.q_stride_n) &&
                    vectors(p.k, p.k_stride_t, p.k_stride_n) && vectors(p.v, p.v_stride_t, p.v_stride_n) &&
                    aligned16(p.out);
  if (fast) {
    const int blocks = p.T / kRows + std::min(p.T, p.B);  // each sequence has one that is not full at most
    gpu::launch(attention_kernel, dim3(unsigned(blocks) * p.N), dim3(kThreads), kSharedBytes, stream, p,
                p.scale * kLog2E);
  } else {
    gpu::launch(attention_plain_kernel, dim3(unsigned(p.T) * p.N), dim3(kThreads), 0, stream, p);
  }
}

}  // namespace kimi::cuda
