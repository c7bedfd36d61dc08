#include "ops/mla_decode.h"

#include <algorithm>

#include "cuda/device.cuh"

namespace kimi::cuda {
namespace {

using Params = MlaDecodeParams<bf16>;

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// How a call is cut up. Rows are the Q * N queries and heads of a sequence; so many of them, a tile, share every key
// that is read. The keys of each tile are cut into runs for different blocks.
struct Plan {
  int tile_rows, tiles;  // rows a tile, tiles a sequence
  int splits;            // runs at most
  int min_run;           // keys
};

// The run of keys of one block, all of them in multiples of plan.min_run's unit so that runs do not depend on the
// batch.
struct Run {
  int b, row, rows;  // sequence; first row, rows of the sequence
  int part, parts;   // this run, runs with keys (or one)
  int begin, end;    // keys
  int length;        // of the sequence; -1: one that the page table cannot hold

  PTX_FN int visible(const Params& p, int at) const { return length - (p.Q - 1 - at / p.N); }  // keys that a row sees
};

struct Largest {  // NaN gives way
  PTX_FN float operator()(float a, float b) const { return fmaxf(a, b); }
};

constexpr int kTileKeys = 32;

PTX_FN Run find_run(const Params& p, const Plan& plan, int b, int tile, int part) {
  const int rows = p.Q * p.N, row = tile * plan.tile_rows, length = p.seq_lens[b];
  Run run{b, row, rows, part, 1, 0, 0, length};
  if (length < 0 || length > int64_t(p.max_pages) * p.page_size) {
    run.length = -1;
    return run;
  }
  const int keys = max(0, run.visible(p, min(row + plan.tile_rows, rows) - 1));
  const unsigned run_keys = max((unsigned(keys) + plan.splits - 1) / plan.splits, unsigned(plan.min_run));
  const unsigned step = (run_keys + kTileKeys - 1) / kTileKeys * kTileKeys;
  run.parts = max(1, int((keys + step - 1) / step));
  run.begin = int(min(unsigned(part) * step, unsigned(keys)));
  run.end = int(min(part * step + step, unsigned(keys)));
  return run;
}

// What a run leaves of a row: the sum of weights * values over that of weights, and the binary logarithm of the latter.
// Where it is the row's only run, that is the result. Else partial results lie in the workspace: out
// [B, splits, rows, C], behind it log2 [B, splits, rows].
PTX_FN int64_t partial_row(const Params& p, const Plan& plan, int b, int part, int row) {
  return (int64_t(b) * plan.splits + part) * (p.Q * p.N) + row;
}
PTX_FN float* partial_log2(const Params& p, const Plan& plan) {
  return p.workspace + int64_t(p.B) * plan.splits * (p.Q * p.N) * p.C;
}

PTX_FN void write_log2(const Params& p, const Plan& plan, const Run& run, int row, float log2) {
  if (run.parts == 1)
    p.lse[int64_t(run.b) * run.rows + row] = log2 * kLn2;
  else
    partial_log2(p, plan)[partial_row(p, plan, run.b, run.part, row)] = log2;
}

// The cache row of a key, null if its page does not exist.
PTX_FN const bf16* cache_row(const Params& p, int page, unsigned key) {
  if (page < 0 || page >= p.pages) return nullptr;
  return static_cast<const bf16*>(p.cache) + (int64_t(page) * p.page_size + key % unsigned(p.page_size)) * (p.C + p.R);
}
PTX_FN int page_of(const Params& p, int b, unsigned key) {
  return p.page_table[int64_t(b) * p.max_pages + key / unsigned(p.page_size)];
}

// ---- any shape -----------------------------------------------------------------------------------
constexpr int kPlainThreads = 128;

// A block a row and run, 128 keys at a time, a thread a key for the scores and a column for the values. Columns past
// the first pass compute the scores again.
__global__ void __launch_bounds__(kPlainThreads) mla_decode_plain_kernel(Params p, Plan plan) {
  constexpr int kColumns = 4;  // a thread
  GPU_SHARED(weight, float[kPlainThreads]);
  GPU_SHARED(rows, const bf16* [kPlainThreads]);
  GPU_SHARED(part, float[kPlainThreads / kWarp]);
  const int unit = blockIdx.x / plan.tiles, tid = threadIdx.x;
  const Run run = find_run(p, plan, unit / plan.splits, blockIdx.x % plan.tiles, unit % plan.splits);
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
  const int parts = find_run(p, plan, int(b), row / plan.tile_rows, 0).parts;
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

// The fewest splits that keep `slots` blocks nearly as busy as any number does, for `work` equal pieces.
int choose_splits(int64_t work, int64_t slots, int64_t most) {
  most = std::max<int64_t>(1, std::min(most, slots));
  const auto busy = [&](int64_t s) { return double(work * s) / double((work * s + slots - 1) / slots * slots); };
  double best = 0;
  for (int64_t s = 1; s <= most; ++s) best = std::max(best, busy(s));
  for (int64_t s = 1; s < most; ++s)
    if (busy(s) >= 0.85 * best) return int(s);
  return int(most);
}

Plan make_plan(const Params& p) {
  const int rows = p.Q * p.N;
  Plan plan{1, rows, 1, kPlainThreads};
  const int64_t work = int64_t(p.B) * plan.tiles;
  if (work > 0)
    plan.splits = choose_splits(work, 8 * int64_t(gpu::device().multiprocessors),
                                (int64_t(p.max_seq_len) + plan.min_run - 1) / plan.min_run);
  return plan;
}

}  // namespace

size_t mla_decode_workspace(const Params& p) {
  const Plan plan = make_plan(p);
  return plan.splits == 1 ? 0 : size_t(p.B) * plan.splits * (p.Q * p.N) * (size_t(p.C) + 1);
}

void mla_decode(const Params& p, Stream stream) {
  const Plan plan = make_plan(p);
  const int64_t blocks = int64_t(p.B) * plan.splits * plan.tiles;
  gpu::launch(mla_decode_plain_kernel, dim3(unsigned(blocks)), dim3(kPlainThreads), 0, stream, p, plan);
  if (plan.splits == 1) return;
  const int warps = plan.splits <= kCombineWarps ? 1 : kCombineWarps;
  const int64_t items = int64_t(p.B) * (p.Q * p.N) * ((p.C + kCombineColumns - 1) / kCombineColumns);
  const int64_t per_block = kCombineWarps / warps;
  gpu::launch(mla_decode_combine_kernel, dim3(unsigned((items + per_block - 1) / per_block)), dim3(kCombineThreads), 0,
              stream, p, plan, warps);
}

}  // namespace kimi::cuda
