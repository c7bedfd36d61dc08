#include "ops/gemm_int4.h"

#include "cuda/grouped.cuh"

namespace kimi::cuda {

// One expert that has all rows.
void gemm_int4(const GemmInt4Params<bf16>& p, Stream stream) {
  run_grouped(
      {.x = p.x,
       .x_stride = p.x_stride,
       .w = {{.weight = p.weight_packed, .scale = p.weight_scale, .n_out = p.n_out, .n_in = p.n_in, .int4 = true}},
       .out = p.out,
       .out_stride = p.out_stride,
       .M = p.T,
       .E = 1,
       .x_vector = rows_aligned(p.x, p.x_stride, p.n_in),
       .out_vector = rows_aligned(p.out, p.out_stride, p.n_out)},
      stream);
}

}  // namespace kimi::cuda
