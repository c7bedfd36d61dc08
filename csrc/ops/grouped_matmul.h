// One product per group of rows in float32: the rows of a group times its matrix, or, for gradients of these matrices,
// summed over the rows of a group.
#pragma once
#include "ops/matmul.h"

namespace kimi {

struct GroupedMatmulParams {
  FloatMatrix a;  // [M, K]; [K, M] with sum_rows
  FloatMatrix b;  // the first of [E, K, N]; [M, N] with sum_rows
  int64_t b_stride_e;
  const int32_t* offsets;  // [E + 1], ascending from 0 to at most M
  float* out;              // [M, N], rows from offsets[E] on are zero; [E, K, N] with sum_rows
  int64_t out_stride_e, out_stride;
  int E, M, K, N;
  bool sum_rows;
};

namespace cpu {
void grouped_matmul(const GroupedMatmulParams& p);
}

}  // namespace kimi
