// What the kernels of mla_decode share: how a call is cut into runs of keys, and where a run leaves its result.
#pragma once

#include "cuda/device.cuh"
#include "ops/mla_decode.h"

namespace kimi::cuda::mla {

using Params = MlaDecodeParams<bf16>;

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// How a call is cut up. Rows are the Q * N queries and heads of a sequence; so many of them, a group, share every
// key that is read. The keys of each group are cut into runs for different blocks.
struct Plan {
  int group_rows, groups;  // rows a group, groups a sequence
  int splits;              // runs at most
  int min_run;             // keys
};

// The run of keys of one block. A sequence's own length decides how it is cut into at most plan.splits.
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

PTX_FN Run find_run(const Params& p, const Plan& plan, int b, int group, int part) {
  const int rows = p.Q * p.N, row = group * plan.group_rows, length = p.seq_lens[b];
  Run run{b, row, rows, part, 1, 0, 0, length};
  if (length < 0 || length > int64_t(p.max_pages) * p.page_size) {
    run.length = -1;
    return run;
  }
  const int keys = max(0, run.visible(p, min(row + plan.group_rows, rows) - 1));
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

// Two columns of a row, as the row's only run or as one of them.
PTX_FN void write_pair(const Params& p, const Plan& plan, const Run& run, int row, int column, float a, float b) {
  if (run.parts == 1) {
    const int64_t at = (int64_t(run.b) * run.rows + row) * p.C + column;
    *reinterpret_cast<unsigned*>(p.out + at) = ptx::pack_bf16(a, b);
  } else {
    float* at = p.workspace + partial_row(p, plan, run.b, run.part, row) * p.C + column;
    at[0] = a, at[1] = b;
  }
}

// The cache row of a key, null if its page does not exist.
PTX_FN const bf16* cache_row(const Params& p, int page, unsigned key) {
  if (page < 0 || page >= p.pages) return nullptr;
  return static_cast<const bf16*>(p.cache) + (int64_t(page) * p.page_size + key % unsigned(p.page_size)) * (p.C + p.R);
}
PTX_FN int page_of(const Params& p, int b, unsigned key) {
  return p.page_table[int64_t(b) * p.max_pages + key / unsigned(p.page_size)];
}

}  // namespace kimi::cuda::mla
