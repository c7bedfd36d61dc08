// SwiGLU's gate: out = silu(x[:, :I]) * x[:, I:].
#pragma once
#include "core/dtype.h"

namespace kimi {

struct SiluAndMulParams {
  const float* x;  // [T, 2 I]
  int64_t x_stride;
  float* out;  // [T, I]
  int64_t out_stride;
  int T, I;
};

namespace cpu {
void silu_and_mul(const SiluAndMulParams& p);
}

}  // namespace kimi
