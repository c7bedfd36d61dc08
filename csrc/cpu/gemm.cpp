#include "ops/gemm.h"

#include "core/parallel.h"
#include "cpu/matmul.h"

namespace kimi::cpu {

void gemm(const GemmParams& p) {
  const Kernels& k = kernels();
  const Bf16Matrix weight{p.weight, p.n_in};
  const Blocks blocks{p.T, p.n_out};
  parallel_for(blocks.count(), 1,
               [&](int64_t i, int64_t) { matmul_rows(k, p.x, p.x_stride, blocks, i, weight, p.out, p.out_stride); });
}

}  // namespace kimi::cpu
