#include "ops/batched_gemm.h"

#include "core/parallel.h"
#include "cpu/matmul.h"

namespace kimi::cpu {
namespace {

// Weight matrix [in, out] in bf16.
struct TransposedMatrix {
  const bf16* w;
  int n_in, n_out;

  void few(const Kernels& k, const float* const* x, int tokens, int row, int rows, float* sums,
           int64_t sums_stride = kBlockRows) const {
    k.gemm->few_bf16_transposed(x, tokens, w + row, n_out, rows, n_in, sums, sums_stride);
  }
  void pack(const Kernels& k, int row, int rows, int begin, int n, int64_t, float* panel) const {
    k.gemm->pack_bf16_transposed(w + int64_t(begin) * n_out + row, n_out, rows, n, panel);
  }
};

// A few tokens by a transposed weight: a thread takes a whole head, row after row as they lie in memory.
void few_transposed(const Kernels& k, const BatchedGemmParams& p) {
  parallel_for(p.N, 1, [&](int64_t n, int64_t) {
    const float* x[kFewTokens];
    for (int t = 0; t < p.T; t++) x[t] = p.x + n * p.x_stride_n + t * p.x_stride_t;
    const TransposedMatrix matrix{p.weight + n * p.weight_stride_n, p.n_in, p.n_out};
    matrix.few(k, x, p.T, 0, p.n_out, p.out + n * p.out_stride_n, p.out_stride_t);
  });
}

void by_blocks(const Kernels& k, const BatchedGemmParams& p) {
  // Columns of a transposed weight come in runs as long as the block is high.
  const Blocks blocks = p.transpose_weight ? Blocks{p.T, p.n_out, kBlockRows} : Blocks{p.T, p.n_out};
  parallel_for(p.N * blocks.count(), 1, [&](int64_t item, int64_t) {
    const int64_t n = item / blocks.count();
    const bf16* weight = p.weight + n * p.weight_stride_n;
    const auto multiply = [&](const auto& matrix) {
      matmul_rows(k, p.x + n * p.x_stride_n, p.x_stride_t, blocks, item % blocks.count(), matrix,
                  p.out + n * p.out_stride_n, p.out_stride_t);
    };
    if (p.transpose_weight)
      multiply(TransposedMatrix{weight, p.n_in, p.n_out});
    else
      multiply(Bf16Matrix{weight, p.n_in});
  });
}

}  // namespace

void batched_gemm(const BatchedGemmParams& p) {
  if (p.transpose_weight && p.T <= kFewTokens)
    few_transposed(kernels(), p);
  else
    by_blocks(kernels(), p);
}

}  // namespace kimi::cpu
