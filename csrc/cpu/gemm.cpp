#include "ops/gemm.h"

#include "core/parallel.h"
#include "cpu/matmul.h"

namespace kimi::cpu {

void gemm(const GemmParams& p) {
  const Kernels& k = kernels();
  const Bf16Matrix weight{p.weight, p.n_in};
  parallel_for(p.n_out, kBlockRows, [&](int64_t begin, int64_t end) {
    matmul_rows(k, p.x, p.x_stride, p.T, weight, int(begin), int(end - begin), p.out, p.out_stride);
  });
}

}  // namespace kimi::cpu
