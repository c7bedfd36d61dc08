// One GEMM per expert over rows sorted by expert. bf16 and INT4 differ in what `experts` points to.
#pragma once
#include "ops/expert_weights.h"

namespace kimi {

struct GroupedGemmParams {
  const float* x;  // [M, in]
  int64_t x_stride;
  ExpertWeights experts;
  const int32_t* offsets;  // [E + 1], ascending from 0 to at most M
  float* out;              // [M, out]; rows from offsets[E] on are zero
  int64_t out_stride;
  int M;
};

namespace cpu {
void grouped_gemm(const GroupedGemmParams& p);
void grouped_gemm_int4(const GroupedGemmParams& p);
}  // namespace cpu

}  // namespace kimi
