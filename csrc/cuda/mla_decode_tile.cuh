// The tensor-core kernel of mla_decode: 16 * M rows of queries and heads share each key that is read.
#pragma once

#include "cuda/mla_decode.cuh"

namespace kimi::cuda::mla {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kScorePitch = kTileKeys + 8;  // so that the fragments of eight rows lie in different banks

// Widths of the cache and how warps share them. For the scores a warp multiplies one half of the columns, so that its
// part of q stays in registers: 16 rows of kHalf columns. For the values it owns kColumns of C.
template <int C_, int R_>
struct Widths {
  static constexpr int C = C_, D = C_ + R_;
  static constexpr int kHalf = (D / 2 + 31) / 32 * 32;  // padded with zeros
  static constexpr int kSteps = kHalf / 16;
  static constexpr int kPitch = kHalf / 4 + 1;  // in eights of columns; odd, so that ldmatrix meets no bank conflict
  static constexpr int kColumns = C / kWarps < 16 ? 16 : C / kWarps;
  static_assert(D % 16 == 0 && C % kColumns == 0 && R_ >= 8);
};

template <class W, int M, int Stages>
struct Memory {
  uint4 keys[Stages][kTileKeys][W::kPitch];   // rows of the cache: keys, and their first C columns values
  float scores[2][16 * M][kScorePitch];       // over either half of the columns
  unsigned weights[16 * M][kScorePitch / 2];  // two bf16 each
  float factor[16 * M];                       // what a row's sums are multiplied by
  int visible[16 * M];                        // keys that a row sees
  Run run;
};

// The page of this thread's row of the tile at `key`: eight threads share a row. Looked up a tile ahead, as the copy
// waits for it.
PTX_FN int look_up(const Params& p, const Run& run, int key) {
  const unsigned row = key + threadIdx.x / 8;
  return row < unsigned(run.end) ? page_of(p, run.b, row) : 0;
}

// Brings 32 cache rows into shared memory, a thread every eighth 16 bytes of its row. Rows behind the run become zeros.
// So does a row whose page does not exist, but for NaN in the rope part: its score is NaN to those who see it, and its
// value nothing to others. once: no other block reads these rows.
template <class W>
PTX_FN void load_tile(const Params& p, const Run& run, int key, int page, bool once,
                      uint4 (&tile)[kTileKeys][W::kPitch]) {
  constexpr int kChunks = W::D / 8;
  const int share = threadIdx.x % 8;
  const unsigned at = key + threadIdx.x / 8;
  const bool inside = at < unsigned(run.end);
  const bf16* row = inside ? cache_row(p, page, at) : nullptr;
  const bf16* from = (row ? row : static_cast<const bf16*>(p.cache)) + 8 * share;
  uint4* to = tile[threadIdx.x / 8] + share;
  const uint64_t policy = ptx::l2_policy(once);
#pragma unroll
  for (int i = 0; i < (kChunks + 7) / 8; ++i) {
    if (share + 8 * i >= kChunks) continue;
    if (share + 8 * i == kChunks - 1 && inside && !row)
      to[8 * i] = {~0u, ~0u, ~0u, ~0u};
    else
      ptx::cp_async16_under(policy, to + 8 * i, from + 64 * i, row ? 16 : 0);
  }
}

// Scores of the warp's 16 rows and 8 * M keys over its half of the columns, which keys points to.
template <class W, int M>
PTX_FN void multiply_keys(const unsigned (&q)[W::kSteps][4], const uint4* keys, float* scores) {
  constexpr int kChains = M == 1 ? 2 : 1;  // of mma that wait for each other
  const int lane = ptx::lane_id();
  float sum[kChains][M][4] = {};
  const uint4* at = keys + lane % 8 * W::kPitch + lane / 8;
#pragma unroll
  for (int s = 0; s < W::kSteps; s += 2)
#pragma unroll
    for (int n = 0; n < M; ++n) {
      unsigned k[4];
      ptx::ldmatrix_x4(k, at + 8 * n * W::kPitch + 2 * s);
      ptx::mma_m16n8k16(sum[0][n], q[s], {k[0], k[1]});
      ptx::mma_m16n8k16(sum[kChains - 1][n], q[s + 1], {k[2], k[3]});
    }
#pragma unroll
  for (int n = 0; n < M; ++n)
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      float2 pair{sum[0][n][i], sum[0][n][i + 1]};
      if (kChains == 2) pair.x += sum[1][n][i], pair.y += sum[1][n][i + 1];
      *reinterpret_cast<float2*>(&scores[(lane / 4 + 4 * i) * kScorePitch + 8 * n + lane % 4 * 2]) = pair;
    }
}

// A row's state, the same in all the 16 / M threads that share it, each with 2 * M of a tile's keys.
template <int M>
struct Softmax {
  static constexpr int kRowThreads = 16 / M, kKeys = 2 * M;

  float largest = -INFINITY, sum = 0;  // sum: of this thread's keys

  // Scores of keys that the row does not see count as none; `key` is the tile's first. Leaves the weights, relative to
  // the largest score so far, and the factor that brings earlier sums to that.
  template <class Shared>
  PTX_FN void step(Shared& shared, float scale, int key) {
    const int tid = threadIdx.x / kWarp * kWarp + ptx::lane_id();
    const int row = tid / kRowThreads, first = tid % kRowThreads * kKeys, visible = shared.visible[row] - key;
    float v[kKeys], top = -INFINITY;
#pragma unroll
    for (int i = 0; i < kKeys; i += 2) {
      const float2 a = *reinterpret_cast<const float2*>(&shared.scores[0][row][first + i]);
      const float2 b = *reinterpret_cast<const float2*>(&shared.scores[1][row][first + i]);
      v[i] = (a.x + b.x) * scale, v[i + 1] = (a.y + b.y) * scale;
    }
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (first + i >= visible) v[i] = -INFINITY;
      top = fmaxf(top, v[i]);
    }
#pragma unroll
    for (int d = kRowThreads / 2; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    top = fmaxf(top, largest);
    const float base = top == -INFINITY ? 0.0f : top, factor = ptx::exp2_approx(largest - base);
    largest = top, sum *= factor;
#pragma unroll
    for (int i = 0; i < kKeys; i += 2) {
      v[i] = ptx::exp2_approx(v[i] - base), v[i + 1] = ptx::exp2_approx(v[i + 1] - base);
      sum += v[i] + v[i + 1];
      shared.weights[row][(first + i) / 2] = ptx::pack_bf16(v[i], v[i + 1]);
    }
    if (first == 0) shared.factor[row] = factor;
  }

  PTX_FN float total() const {
    float all = sum;
#pragma unroll
    for (int d = kRowThreads / 2; d > 0; d /= 2) all += __shfl_xor_sync(~0u, all, d);
    return all;
  }
};

// out += weights * values, over the warp's columns, which values points to.
template <class W, int M>
PTX_FN void multiply_values(const unsigned (&weights)[16 * M][kScorePitch / 2], const uint4* values,
                            float (&out)[M][W::kColumns / 8][4]) {
  const int lane = ptx::lane_id();
#pragma unroll
  for (int s = 0; s < kTileKeys; s += 16) {
    unsigned w[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) ptx::ldmatrix_x4(w[m], &weights[16 * m + lane % 16][s / 2 + lane / 16 * 4]);
#pragma unroll
    for (int n = 0; n < W::kColumns / 8; n += 2) {
      unsigned v[4];
      ptx::ldmatrix_x4_trans(v, values + (s + lane % 16) * W::kPitch + n + lane / 16);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ptx::mma_m16n8k16(out[m][n], w[m], {v[0], v[1]});
        ptx::mma_m16n8k16(out[m][n + 1], w[m], {v[2], v[3]});
      }
    }
  }
}

// The warp's part of q: 16 rows from `row` on, kHalf columns from `column` on.
template <class W>
PTX_FN void load_query(const Params& p, const Run& run, int row, int column, unsigned (&q)[W::kSteps][4]) {
  const int lane = threadIdx.x % kWarp;
  row += lane / 4, column += lane % 4 * 2;
  const bf16* from = p.q + (int64_t(run.b) * run.rows + row) * W::D + column;
#pragma unroll
  for (int s = 0; s < W::kSteps; ++s)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int down = i % 2 * 8, right = 16 * s + i / 2 * 8;
      q[s][i] = 0;
      if (row + down < run.rows && column + right < W::D)
        q[s][i] = *reinterpret_cast<const unsigned*>(from + down * W::D + right);
    }
}

// A block a group of rows and run. Warp w multiplies half w % 2 of the columns of q and keys: rows 16 * (w / 2 % M) on,
// keys 8 * M * (w / 2 / M) on. Of the values it takes all rows and keys and its own columns.
template <class W, int M, int Stages>
__global__ void __launch_bounds__(kThreads, 1) mla_decode_tile_kernel(Params p, Plan plan) {
  GPU_SHARED_DYNAMIC(bytes, 16);
  auto& shared = *reinterpret_cast<Memory<W, M, Stages>*>(bytes);
  const int unit = blockIdx.x / plan.groups, tid = threadIdx.x, warp = tid / kWarp, lane = tid % kWarp;
  const Run found = find_run(p, plan, unit / plan.splits, blockIdx.x % plan.groups, unit % plan.splits);
  if (found.part >= found.parts) return;
  const Run& run = shared.run;
  if (tid == 0) shared.run = found;
  __syncthreads();
  int page = look_up(p, run, run.begin);
#pragma unroll
  for (int i = 0; i < Stages - 1; ++i) {
    const int key = run.begin + i * kTileKeys;
    if (key < run.end) {
      load_tile<W>(p, run, key, page, plan.groups == 1, shared.keys[i]);
      page = look_up(p, run, key + kTileKeys);
    }
    ptx::cp_async_commit();
  }
  if constexpr (2 * W::kHalf > W::D)
    for (int i = tid; i < Stages * kTileKeys; i += kThreads)
      for (int c = W::D / 8; c < W::kHalf / 4; ++c) shared.keys[i / kTileKeys][i % kTileKeys][c] = {0, 0, 0, 0};

  const int half = warp % 2 * W::kHalf, q_row = warp / 2 % M * 16,
            k_row = M == 4 ? 0 : warp / 2 / M * 8 * M;  // the compiler does not know warp < 8
  unsigned q[W::kSteps][4];
  load_query<W>(p, run, run.row + q_row, half, q);

  float out[M][W::kColumns / 8][4] = {};
  Softmax<M> softmax;
  const int column = warp * W::kColumns;
  const int softmax_row = tid / (16 / M);
  if (tid < 16 * M) shared.visible[tid] = run.visible(p, run.row + tid);
  for (int key = run.begin, stage = 0; key < run.end; key += kTileKeys, stage = stage + 1 == Stages ? 0 : stage + 1) {
    ptx::cp_async_wait<Stages - 2>();
    __syncthreads();  // the tile is there, and all are done with the one before, which the next load replaces
    const auto& keys = shared.keys[stage];
    if (const int ahead = key + (Stages - 1) * kTileKeys; ahead < run.end) {
      load_tile<W>(p, run, ahead, page, plan.groups == 1, shared.keys[stage == 0 ? Stages - 1 : stage - 1]);
      page = look_up(p, run, ahead + kTileKeys);
    }
    ptx::cp_async_commit();
    multiply_keys<W, M>(q, &keys[k_row][half / 8], &shared.scores[warp % 2][q_row][k_row]);
    __syncthreads();
    softmax.step(shared, p.scale * kLog2E, key);
    __syncthreads();
    if (column >= W::C) continue;
    float factor[M][2];
    bool same = true;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        factor[m][j] = shared.factor[16 * m + 8 * j + lane / 4], same = same && factor[m][j] == 1;
    if (!__all_sync(~0u, same))
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < W::kColumns / 8; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j) out[m][n][j] *= factor[m][j / 2];
    multiply_values<W, M>(shared.weights, &keys[0][column / 8], out);
  }

  __syncthreads();  // all are done with the factors
  const float sum = run.length < 0 ? NAN : softmax.total();
  if (tid % (16 / M) == 0) {
    shared.factor[softmax_row] = sum == 0 ? 0.0f : 1.0f / sum;
    const int row = run.row + softmax_row;
    if (row < run.rows) write_log2(p, plan, run, row, sum == 0 ? -INFINITY : softmax.largest + log2f(sum));
  }
  __syncthreads();
  if (column >= W::C) return;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at = 16 * m + 8 * j + lane / 4, row = run.row + at;
      if (row >= run.rows) continue;
      const float factor = shared.factor[at];
#pragma unroll
      for (int n = 0; n < W::kColumns / 8; ++n)
        write_pair(p, plan, run, row, column + 8 * n + lane % 4 * 2, out[m][n][2 * j] * factor,
                   out[m][n][2 * j + 1] * factor);
    }
}

}  // namespace kimi::cuda::mla
