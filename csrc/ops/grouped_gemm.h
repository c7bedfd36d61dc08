// One GEMM per expert over rows sorted by expert. bf16 and INT4 differ in what `experts` points to.
#pragma once
#include "core/stream.h"
#include "ops/expert_weights.h"

namespace kimi {

template <class Activation>
struct GroupedGemmParams {
  const Activation* x;  // [M, in]
  int64_t x_stride;
  ExpertWeights experts;
  const int32_t* offsets;  // [E + 1], ascending from 0 to at most M
  Activation* out;         // [M, out]; rows from offsets[E] on are zero
  int64_t out_stride;
  int M;
};

namespace cpu {
void grouped_gemm(const GroupedGemmParams<float>& p);
void grouped_gemm_int4(const GroupedGemmParams<float>& p);
}  // namespace cpu
namespace cuda {
void grouped_gemm(const GroupedGemmParams<bf16>& p, Stream stream);
void grouped_gemm_int4(const GroupedGemmParams<bf16>& p, Stream stream);
}  // namespace cuda

}  // namespace kimi
