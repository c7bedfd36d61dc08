#include "ops/mla_decode.h"

#include <algorithm>

#include "cuda/mla_decode_tile.cuh"

namespace kimi::cuda {
namespace {

using namespace mla;

// ---- any shape -----------------------------------------------------------------------------------
constexpr int kPlainThreads = 128;

// A block a row and run, 128 keys at a time, a thread a key for the scores and a column for the values. Columns past
// the first pass compute the scores again.
__global__ void __launch_bounds__(kPlainThreads, 8) mla_decode_plain_kernel(Params p, Plan plan) {
  constexpr int kColumns = 4;  // a thread
  GPU_SHARED(weight, float[kPlainThreads]);
  GPU_SHARED(rows, const bf16* [kPlainThreads]);
  GPU_SHARED(part, float[kPlainThreads / kWarp]);
  const int unit = blockIdx.x / plan.groups, tid = threadIdx.x;
  const Run run = find_run(p, plan, unit / plan.splits, blockIdx.x % plan.groups, unit % plan.splits);
  if (run.part >= run.parts) return;
  const int64_t row = int64_t(run.b) * run.rows + run.row;
  const bf16* q = p.q + row * (p.C + p.R);

  for (int pass = 0; pass < p.C; pass += kPlainThreads * kColumns) {
    float value[kColumns] = {}, largest = -INFINITY, sum = run.length < 0 ? NAN : 0.0f;
    for (int first = run.begin; first < run.end; first += kPlainThreads) {
      const int count = min(kPlainThreads, run.end - first);
      float score = -INFINITY;
      if (tid < count) {
        const bf16* k = rows[tid] = cache_row(p, page_of(p, run.b, first + tid), first + tid);
        score = k ? 0.0f : NAN;
        for (int i = 0; k && i < p.C + p.R; ++i) score += to_float(q[i]) * to_float(k[i]);
        score *= p.scale * kLog2E;
      }
      const float top = fmaxf(largest, block_reduce<kPlainThreads>(score, -INFINITY, part, Largest()));
      const float base = top == -INFINITY ? 0.0f : top, shrink = ptx::exp2_approx(largest - base);
      weight[tid] = tid < count ? ptx::exp2_approx(score - base) : 0.0f;
      sum = sum * shrink + block_reduce<kPlainThreads>(weight[tid], 0.0f, part, Add());
      largest = top;
      for (int c = 0; c < kColumns; ++c) {
        const int column = pass + c * kPlainThreads + tid;
        value[c] *= shrink;
        for (int j = 0; column < p.C && j < count; ++j)
          value[c] += rows[j] ? weight[j] * to_float(rows[j][column]) : NAN;
      }
      __syncthreads();  // before the next weights
    }
    const float scale = sum == 0 ? 0.0f : 1.0f / sum;
    for (int c = 0; c < kColumns; ++c) {
      const int column = pass + c * kPlainThreads + tid;
      if (column >= p.C) continue;
      if (run.parts == 1)
        p.out[row * p.C + column] = to_bf16(value[c] * scale);
      else
        p.workspace[partial_row(p, plan, run.b, run.part, run.row) * p.C + column] = value[c] * scale;
    }
    if (tid == 0) write_log2(p, plan, run, run.row, sum == 0 ? -INFINITY : largest + log2f(sum));
  }
}

// ---- joining runs --------------------------------------------------------------------------------
constexpr int kCombineThreads = 256, kCombineWarps = kCombineThreads / kWarp, kCombineColumns = 4 * kWarp;

// `warps` warps of a block share a row and 128 columns of it, each with every warps-th run.
__global__ void __launch_bounds__(kCombineThreads) mla_decode_combine_kernel(Params p, Plan plan, int warps) {
  GPU_SHARED(shared, float[kCombineWarps][kCombineColumns]);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, share = warp % warps, rows = p.Q * p.N;
  const int blocks = (p.C + kCombineColumns - 1) / kCombineColumns;
  const int64_t item = int64_t(blockIdx.x) * (kCombineWarps / warps) + warp / warps;
  const int row = int(item / blocks % rows), column = int(item % blocks) * kCombineColumns + lane;
  const int64_t b = item / blocks / rows;
  if (b >= p.B) return;
  const int parts = find_run(p, plan, int(b), row / plan.group_rows, 0).parts;
  if (parts == 1) return;  // written already

  const float* log2 = partial_log2(p, plan) + partial_row(p, plan, int(b), 0, row);
  float top = -INFINITY, sum = 0, value[4] = {};
  for (int i = lane; i < parts; i += kWarp) top = fmaxf(top, log2[int64_t(i) * rows]);
  top = warp_reduce(top, Largest());
  const float base = top == -INFINITY ? 0.0f : top;
  for (int i = lane; i < parts; i += kWarp) sum += ptx::exp2_approx(log2[int64_t(i) * rows] - base);
  sum = warp_reduce(sum, Add());
#pragma unroll 4
  for (int i = share; i < parts; i += warps) {
    const float* from = p.workspace + partial_row(p, plan, int(b), i, row) * p.C + column;
    const float weight = ptx::exp2_approx(log2[int64_t(i) * rows] - base);
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (column + c * kWarp < p.C) value[c] += weight * from[c * kWarp];
  }
  if (warps > 1) {
    for (int c = 0; c < 4; ++c) shared[warp][c * kWarp + lane] = value[c];
    __syncthreads();
    if (share > 0) return;
    for (int i = 1; i < warps; ++i)
      for (int c = 0; c < 4; ++c) value[c] += shared[warp + i][c * kWarp + lane];
  }
  const float scale = sum == 0 ? 0.0f : 1.0f / sum;
  bf16* out = p.out + (b * rows + row) * p.C + column;
  for (int c = 0; c < 4; ++c)
    if (column + c * kWarp < p.C) out[c * kWarp] = to_bf16(value[c] * scale);
  if (column == 0) p.lse[b * rows + row] = (sum == 0 ? -INFINITY : top + log2f(sum)) * kLn2;
}

// ---- launch --------------------------------------------------------------------------------------

// The kernel for a call's shape, and what it takes.
struct Variant {
  void (*kernel)(Params, Plan);
  int threads;
  size_t shared;
  Plan plan;  // splits to be chosen
  int blocks_per_multiprocessor;
};

template <class W, int M, int Stages>
Variant tile_variant(int rows) {
  const int groups = (rows + 16 * M - 1) / (16 * M);
  return {mla_decode_tile_kernel<W, M, Stages>,
          kThreads,
          sizeof(Memory<W, M, Stages>),
          {16 * M, groups, 1, kTileKeys * std::max(2, M)},
          1};
}

// As many rows in a group as there are, up to 64.
template <class W, int Stages>
Variant tile_variant(int rows) {
  if (rows <= 16) return tile_variant<W, 1, Stages>(rows);
  return rows <= 32 ? tile_variant<W, 2, Stages>(rows) : tile_variant<W, 4, Stages>(rows);
}

Variant choose(const Params& p) {
  using Model = Widths<512, 64>;
  using Tiny = Widths<64, 16>;
  constexpr int kDeep = 3, kShallow = 2;  // tiles in shared memory: where there is much of it, and everywhere
  const int rows = p.Q * p.N;
  const bool aligned = aligned16(p.cache) && aligned16(p.q) && aligned16(p.out);
  if (aligned && p.C == 512 && p.R == 64)
    return size_t(gpu::device().shared_per_block) < sizeof(Memory<Model, 4, kDeep>)
               ? tile_variant<Model, kShallow>(rows)
               : tile_variant<Model, kDeep>(rows);
  if (aligned && p.C == 64 && p.R == 16) return tile_variant<Tiny, kDeep>(rows);
  return {mla_decode_plain_kernel, kPlainThreads, 0, {1, rows, 1, kPlainThreads}, 8};
}

// The number of runs that takes the least time, in keys that a multiprocessor reads meanwhile: turns of `slots` blocks,
// each of a run's keys, about 32 to start, and the partial results where there are several runs, written and read once.
int choose_splits(const Params& p, const Plan& plan, int64_t slots) {
  const int64_t work = int64_t(p.B) * plan.groups;
  if (work == 0) return 1;
  const int64_t most = std::max<int64_t>(1, (int64_t(p.max_seq_len) + plan.min_run - 1) / plan.min_run);
  const int64_t partial = int64_t(2 * sizeof(float)) * plan.group_rows * p.C / (sizeof(bf16) * (p.C + p.R));
  const int64_t fewest = (work + slots - 1) / slots;
  int64_t best = 1, best_cost = fewest * (p.max_seq_len + 32);
  for (int64_t turns = fewest; turns < fewest + 16; ++turns) {
    const int64_t splits = std::min(most, turns * slots / work);  // as many as fit in these turns
    const int64_t cost = turns * (p.max_seq_len / splits + 32 + partial);
    if (splits > 1 && cost < best_cost) best = splits, best_cost = cost;
  }
  return int(best);
}

Variant make_variant(const Params& p) {
  Variant v = choose(p);
  v.plan.splits = choose_splits(p, v.plan, int64_t(v.blocks_per_multiprocessor) * gpu::device().multiprocessors);
  return v;
}

}  // namespace

size_t mla_decode_workspace(const Params& p) {
  const int splits = make_variant(p).plan.splits;
  return splits == 1 ? 0 : size_t(p.B) * splits * (p.Q * p.N) * (size_t(p.C) + 1);
}

void mla_decode(const Params& p, Stream stream) {
  const Variant v = make_variant(p);
  const int64_t blocks = int64_t(p.B) * v.plan.splits * v.plan.groups;
  gpu::launch(v.kernel, dim3(unsigned(blocks)), dim3(v.threads), v.shared, stream, p, v.plan);
  if (v.plan.splits == 1) return;
  const int warps = v.plan.splits <= kCombineWarps ? 1 : kCombineWarps, per_block = kCombineWarps / warps;
  const int64_t items = int64_t(p.B) * (p.Q * p.N) * ((p.C + kCombineColumns - 1) / kCombineColumns);
  gpu::launch(mla_decode_combine_kernel, dim3(unsigned((items + per_block - 1) / per_block)), dim3(kCombineThreads), 0,
              stream, p, v.plan, warps);
}

}  // namespace kimi::cuda
