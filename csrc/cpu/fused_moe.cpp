#include "ops/fused_moe.h"

#include "core/parallel.h"
#include "cpu/matmul.h"
#include "cpu/sort_by_expert.h"

namespace kimi {
namespace cpu {
namespace {

// The workspace: activations, as floats and as integers, then the integers of the sort.
struct Workspace {
  Inputs x, act;    // act: [M, I] silu(gate x) * up x, rows sorted by expert
  float* act_rows;  // where act is written
  float* sums;      // [T, H] of experts, where there is more to add: rows `sums_stride` apart
  int64_t sums_stride;
  int32_t* inverse;  // [M] sorted row of each (token, slot)
  int32_t* pair;     // [M] the way back: (token, slot) of each sorted row
  int32_t* offsets;  // [E + 1]
  int32_t* active;   // [min(E, M)] experts with tokens, ascending
  size_t bytes = 0;

  explicit Workspace(const FusedMoeParams<float>& p) {
    const int64_t M = int64_t(p.T) * p.K;
    char* base = reinterpret_cast<char*>(p.workspace);
    base += -reinterpret_cast<uintptr_t>(base) % kAlignment;
    const auto take = [&](int64_t n) {
      char* const at = base + bytes;
      bytes += (n + kAlignment - 1) / kAlignment * kAlignment;
      return at;
    };
    act_rows = reinterpret_cast<float*>(take(M * p.I * sizeof(float)));
    sums = p.accumulate ? reinterpret_cast<float*>(take(int64_t(p.T) * p.H * sizeof(float))) : p.out;
    sums_stride = p.accumulate ? p.H : p.out_stride;
    x = quantized({.x = p.x, .stride = p.x_stride}, p.gate.scale && p.up.scale, p.T, p.H, p.digits, take);
    act = quantized({.x = act_rows, .stride = p.I}, p.down.scale, M, p.I, p.digits, take);
    inverse = reinterpret_cast<int32_t*>(take((3 * M + p.E + 1) * sizeof(int32_t)));
    pair = inverse + M, active = pair + M, offsets = active + M;
    bytes += kAlignment;
  }

 private:
  static constexpr int64_t kAlignment = 64;  // of what memory gives at the least, and integer rows ask for

  template <class Take>
  static Inputs quantized(Inputs in, bool int4, int64_t rows, int n, int digits, const Take& take) {
    if (!int4 || !digits) return in;
    in.quantized_stride = kernels().quantized->row_bytes(n, digits), in.digits = digits;
    in.quantized = take(rows * in.quantized_stride);
    return in;
  }
};

}  // namespace

size_t fused_moe_workspace(const FusedMoeParams<float>& p) { return Workspace(p).bytes / sizeof(float); }

namespace {

void quantize(const Kernels& k, const Inputs& in, int64_t rows, int n) {
  if (!in.quantized) return;
  constexpr int kInputs = 1 << 13;  // that a thread takes at once
  parallel_for(rows, std::max(1, kInputs / std::max(n, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      k.quantized->quantize(in.x + row * in.stride, n, in.digits,
                            const_cast<char*>(in.quantized) + row * in.quantized_stride);
  });
}

// Sorts the pairs by expert and returns how many experts have tokens.
int sort_pairs(const FusedMoeParams<float>& p, const Workspace& s) {
  const int M = p.T * p.K;
  sort_by_expert(p.topk_ids, M, p.E, s.offsets, s.inverse);
  for (int i = 0; i < M; i++)
    if (s.inverse[i] >= 0) s.pair[s.inverse[i]] = i;
  int active = 0;
  for (int e = 0; e < p.E; e++)
    if (s.offsets[e + 1] > s.offsets[e]) s.active[active++] = e;
  return active;
}

// Asks for the rows that a block begins with: kernels ask for what follows those that they read.
void ask_for_first(const ExpertWeights& w, int e, int row) {
  constexpr int kWeights = 4096, kScales = 512;  // bytes beyond the first row
  if (!w.scale) return;
  const auto* weights = static_cast<const char*>(w.weight[e]) + int64_t(row) * w.n_in / 2;
  const auto* scales = reinterpret_cast<const char*>(w.scale[e] + int64_t(row) * w.n_in / kInt4Group);
  for (int i = 0; i < w.n_in / 2 + kWeights; i += 64) __builtin_prefetch(weights + i, 0, 2);
  for (int i = 0; i < w.n_in / 16 + kScales; i += 64) __builtin_prefetch(scales + i, 0, 2);
}

// act[first + i][row..row + rows) for the tokens of expert e: gate and up side by side, then SwiGLU.
void gate_and_up(const Kernels& k, const FusedMoeParams<float>& p, const Workspace& s, int e, int row, int rows) {
  float gate[kBlockT * kBlockRows], up[kBlockT * kBlockRows];
  int64_t tokens_of[kBlockT];
  for (int first = s.offsets[e]; first < s.offsets[e + 1]; first += kBlockT) {
    const int tokens = std::min(kBlockT, s.offsets[e + 1] - first);
    for (int i = 0; i < tokens; i++) tokens_of[i] = s.pair[first + i] / p.K;
    ask_for_first(p.up, e, row);
    matmul_expert(k, s.x, tokens_of, tokens, p.gate, e, row, rows, gate);
    matmul_expert(k, s.x, tokens_of, tokens, p.up, e, row, rows, up);
    for (int i = 0; i < tokens; i++)
      k.silu_and_mul(gate + i * kBlockRows, up + i * kBlockRows, s.act_rows + int64_t(first + i) * p.I + row, rows);
  }
}

// sums[token][row..row + rows) += router weight * down_e act, for the tokens of expert e.
void down_and_add(const Kernels& k, const FusedMoeParams<float>& p, const Workspace& s, int e, int row, int rows) {
  float sums[kBlockT * kBlockRows];
  int64_t sorted[kBlockT];
  for (int first = s.offsets[e]; first < s.offsets[e + 1]; first += kBlockT) {
    const int tokens = std::min(kBlockT, s.offsets[e + 1] - first);
    for (int i = 0; i < tokens; i++) sorted[i] = first + i;
    matmul_expert(k, s.act, sorted, tokens, p.down, e, row, rows, sums);
    for (int i = 0; i < tokens; i++) {
      const int pair = s.pair[first + i];
      k.add_scaled(s.sums + pair / p.K * s.sums_stride + row, p.topk_weights[pair], sums + i * kBlockRows, rows);
    }
  }
}

// Rows that a thread takes at once: weights that follow each other are read ahead. No sum depends on it.
int item_rows(int64_t all, int tokens) {
  const int least = tokens <= kFewTokens ? kFewRows : kBlockRows;
  return int(std::clamp<int64_t>(all / (8 * num_threads()), least, 4 * kBlockRows)) / least * least;
}

}  // namespace

// Experts are added in ascending order, so the sum over K experts has one order whatever the batch is.
void fused_moe(const FusedMoeParams<float>& p) {
  const Kernels& k = kernels();
  const Workspace s(p);
  const int active = sort_pairs(p, s);
  quantize(k, s.x, p.T, p.H);
  const auto blocks_of = [&](int begin, int end, auto&& body) {
    for (int row = begin; row < end; row += kBlockRows) body(row, std::min(kBlockRows, end - row));
  };
  const int up_rows = item_rows(int64_t(active) * p.I, p.T), ranges = (p.I + up_rows - 1) / up_rows;
  parallel_for(int64_t(active) * ranges, 1, [&](int64_t item, int64_t) {
    const int begin = int(item % ranges) * up_rows;
    blocks_of(begin, std::min(p.I, begin + up_rows),
              [&](int row, int rows) { gate_and_up(k, p, s, s.active[item / ranges], row, rows); });
  });
  quantize(k, s.act, s.offsets[p.E], p.I);
  parallel_for(p.H, item_rows(p.H, p.T), [&](int64_t begin, int64_t end) {
    for (int t = 0; t < p.T; t++) std::fill_n(s.sums + t * s.sums_stride + begin, end - begin, 0.0f);
    for (int i = 0; i < active; i++) {
      if (i + 1 < active) ask_for_first(p.down, s.active[i + 1], int(begin));
      blocks_of(int(begin), int(end), [&](int row, int rows) { down_and_add(k, p, s, s.active[i], row, rows); });
    }
    if (p.accumulate)
      for (int t = 0; t < p.T; t++)
        k.add_scaled(p.out + t * p.out_stride + begin, 1.0f, s.sums + t * s.sums_stride + begin, end - begin);
  });
}

}  // namespace cpu
}  // namespace kimi
