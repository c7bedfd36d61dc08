#include "ops/batched_gemm.h"

#include "core/parallel.h"
#include "cpu/matmul.h"

namespace kimi::cpu {
namespace {

// Weight matrix [in, out] in bf16: its rows are what a strip is made of, few tokens gain nothing by another way.
struct TransposedMatrix {
  const bf16* w;
  int n_in, n_out;

  void few(const Kernels& k, const float* const* x, int tokens, int row, int rows, float* sums) const {
    multiply_block(k, x, tokens, *this, row, rows, sums);
  }
  void pack(const Kernels& k, int row, int rows, int begin, int n, int64_t, float* panel) const {
    k.gemm->pack_bf16_transposed(w + int64_t(begin) * n_out + row, n_out, rows, n, panel);
  }
};

}  // namespace

void batched_gemm(const BatchedGemmParams& p) {
  const Kernels& k = kernels();
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

}  // namespace kimi::cpu
