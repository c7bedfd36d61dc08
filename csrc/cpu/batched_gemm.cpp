#include "ops/batched_gemm.h"

#include "core/parallel.h"
#include "cpu/matmul.h"

namespace kimi::cpu {
namespace {

constexpr int kBlockIn = 64, kBlockOut = 128;  // the transposed panel is 32 KiB

// out[t][begin..end) = sum_i x[t][i] * W[i][begin..end): rows of W are widened a block at a time and added up.
void multiply_transposed(const Kernels& k, const BatchedGemmParams& p, int n, int begin, int end) {
  const bf16* weight = p.weight + n * p.weight_stride_n;
  const float* x = p.x + n * p.x_stride_n;
  float* out = p.out + n * p.out_stride_n;
  for (int t = 0; t < p.T; t++) std::fill(out + t * p.out_stride_t + begin, out + t * p.out_stride_t + end, 0.0f);
  alignas(64) float panel[kBlockIn * kBlockOut];
  for (int i = 0; i < p.n_in; i += kBlockIn) {
    const int rows = std::min(kBlockIn, p.n_in - i);
    for (int r = 0; r < rows; r++)
      k.widen(weight + int64_t(i + r) * p.n_out + begin, panel + r * kBlockOut, end - begin);
    for (int t = 0; t < p.T; t += kTileT) {
      const int tokens = std::min(kTileT, p.T - t);
      const float* xs[kTileT];
      float* outs[kTileT];
      for (int j = 0; j < tokens; j++)
        xs[j] = x + (t + j) * p.x_stride_t + i, outs[j] = out + (t + j) * p.out_stride_t + begin;
      k.add_weighted_rows(xs, tokens, panel, kBlockOut, rows, outs, end - begin);
    }
  }
}

}  // namespace

void batched_gemm(const BatchedGemmParams& p) {
  const Kernels& k = kernels();
  const int block = p.transpose_weight ? kBlockOut : kBlockRows;
  const int64_t blocks = (p.n_out + block - 1) / block;
  parallel_for(p.N * blocks, 1, [&](int64_t item, int64_t) {
    const int n = int(item / blocks), begin = int(item % blocks) * block, end = std::min(p.n_out, begin + block);
    if (p.transpose_weight) return multiply_transposed(k, p, n, begin, end);
    const Bf16Matrix weight{p.weight + n * p.weight_stride_n, p.n_in};
    matmul_rows(k, p.x + n * p.x_stride_n, p.x_stride_t, p.T, weight, begin, end - begin, p.out + n * p.out_stride_n,
                p.out_stride_t);
  });
}

}  // namespace kimi::cpu
