#include "ops/gemm_int4.h"

#include "core/parallel.h"
#include "cpu/matmul.h"

namespace kimi::cpu {

void gemm_int4(const GemmInt4Params<float>& p) {
  const Kernels& k = kernels();
  const Int4Matrix weight{reinterpret_cast<const uint8_t*>(p.weight_packed), p.weight_scale, p.n_in};
  parallel_for(p.n_out, kBlockRows, [&](int64_t begin, int64_t end) {
    matmul_rows(k, p.x, p.x_stride, p.T, weight, int(begin), int(end - begin), p.out, p.out_stride);
  });
}

}  // namespace kimi::cpu
