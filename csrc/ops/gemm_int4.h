// out = x @ weight^T with packed INT4 weights; q * scale stays exact in float32.
#pragma once
#include "core/dtype.h"

namespace kimi {

constexpr int kInt4Group = 32;  // inputs that share a scale

struct GemmInt4Params {
  const float* x;  // [T, in]
  int64_t x_stride;
  const int32_t* weight_packed;  // [out, in / 8], low nibble first, value = nibble - 8
  const bf16* weight_scale;      // [out, in / 32]
  float* out;                    // [T, out]
  int64_t out_stride;
  int T, n_in, n_out;
};

namespace cpu {
void gemm_int4(const GemmInt4Params& p);
}

}  // namespace kimi
