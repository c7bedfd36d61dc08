// The path of grouped_gemm_int4 for Hopper and many rows an expert.
#pragma once
#include "ops/grouped_gemm.h"

namespace kimi::cuda::sm90 {

// Whether this GPU can run it on arrays like these.
bool fits(const GroupedGemmParams<bf16>& p);
void grouped_gemm_int4(const GroupedGemmParams<bf16>& p, Stream stream);  // gpu::Error unless it fits

}  // namespace kimi::cuda::sm90
