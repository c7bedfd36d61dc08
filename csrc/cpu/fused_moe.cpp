#include "ops/fused_moe.h"

#include "core/parallel.h"
#include "cpu/matmul.h"
#include "cpu/sort_by_expert.h"

namespace kimi {
namespace {

// The workspace: act [M, I] floats, then the integers of the sort.
struct Workspace {
  float* act;        // [M, I] silu(gate x) * up x, rows sorted by expert
  int32_t* inverse;  // [M] sorted row of each (token, slot)
  int32_t* pair;     // [M] the way back: (token, slot) of each sorted row
  int32_t* offsets;  // [E + 1]
  int32_t* active;   // [min(E, M)] experts with tokens, ascending

  Workspace(const FusedMoeParams<float>& p) {
    const int64_t M = int64_t(p.T) * p.K;
    act = p.workspace;
    inverse = reinterpret_cast<int32_t*>(act + M * p.I);
    pair = inverse + M;
    offsets = pair + M;
    active = offsets + p.E + 1;
  }
};

}  // namespace

namespace cpu {

size_t fused_moe_workspace(const FusedMoeParams<float>& p) {
  const int64_t M = int64_t(p.T) * p.K;
  return size_t(M * p.I + 2 * M + p.E + 1 + std::min<int64_t>(p.E, M));
}

namespace {

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

// act[first + i][row..row + rows) for the tokens of expert e: gate and up side by side, then SwiGLU.
void gate_and_up(const Kernels& k, const FusedMoeParams<float>& p, const Workspace& s, int e, int row, int rows) {
  float gate[kBlockT * kBlockRows], up[kBlockT * kBlockRows];
  const float* xs[kBlockT];
  for (int first = s.offsets[e]; first < s.offsets[e + 1]; first += kBlockT) {
    const int tokens = std::min(kBlockT, s.offsets[e + 1] - first);
    for (int i = 0; i < tokens; i++) xs[i] = p.x + s.pair[first + i] / p.K * p.x_stride;
    with_expert(p.gate, e, [&](const auto& w) { matmul_block(k, xs, tokens, w, row, rows, gate); });
    with_expert(p.up, e, [&](const auto& w) { matmul_block(k, xs, tokens, w, row, rows, up); });
    for (int i = 0; i < tokens; i++)
      k.silu_and_mul(gate + i * kBlockRows, up + i * kBlockRows, s.act + int64_t(first + i) * p.I + row, rows);
  }
}

// out[token][row..row + rows) += router weight * down_e act, for the tokens of expert e.
void down_and_add(const Kernels& k, const FusedMoeParams<float>& p, const Workspace& s, int e, int row, int rows) {
  float sums[kBlockT * kBlockRows];
  const float* xs[kBlockT];
  for (int first = s.offsets[e]; first < s.offsets[e + 1]; first += kBlockT) {
    const int tokens = std::min(kBlockT, s.offsets[e + 1] - first);
    for (int i = 0; i < tokens; i++) xs[i] = s.act + int64_t(first + i) * p.I;
    with_expert(p.down, e, [&](const auto& w) { matmul_block(k, xs, tokens, w, row, rows, sums); });
    for (int i = 0; i < tokens; i++) {
      const int pair = s.pair[first + i];
      float* out = p.out + pair / p.K * p.out_stride + row;
      for (int r = 0; r < rows; r++) out[r] += p.topk_weights[pair] * sums[i * kBlockRows + r];
    }
  }
}

}  // namespace

// Experts are added in ascending order, so the sum over K experts has one order whatever the batch is.
void fused_moe(const FusedMoeParams<float>& p) {
  const Kernels& k = kernels();
  const Workspace s(p);
  const int active = sort_pairs(p, s);
  const int64_t blocks = (p.I + kBlockRows - 1) / kBlockRows;
  parallel_for(active * blocks, 1, [&](int64_t item, int64_t) {
    const int row = int(item % blocks) * kBlockRows;
    gate_and_up(k, p, s, s.active[item / blocks], row, std::min(kBlockRows, p.I - row));
  });
  parallel_for(p.H, kBlockRows, [&](int64_t begin, int64_t end) {
    for (int t = 0; t < p.T; t++) std::fill(p.out + t * p.out_stride + begin, p.out + t * p.out_stride + end, 0.0f);
    for (int i = 0; i < active; i++) down_and_add(k, p, s, s.active[i], int(begin), int(end - begin));
  });
}

}  // namespace cpu
}  // namespace kimi
