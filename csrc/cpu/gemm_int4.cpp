#include "ops/gemm_int4.h"

#include "core/parallel.h"
#include "cpu/matmul.h"

namespace kimi::cpu {

void gemm_int4(const GemmInt4Params<float>& p) {
  const Kernels& k = kernels();
  const Int4Matrix weight{reinterpret_cast<const uint8_t*>(p.weight_packed), p.weight_scale, p.n_in};
  const Blocks blocks{p.T, p.n_out};
  parallel_for(blocks.count(), 1,
               [&](int64_t i, int64_t) { matmul_rows(k, p.x, p.x_stride, blocks, i, weight, p.out, p.out_stride); });
}

}  // namespace kimi::cpu
