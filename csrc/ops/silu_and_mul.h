// SwiGLU's gate: out = silu(x[:, :I]) * x[:, I:].
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace kimi {

template <class Activation>
struct SiluAndMulParams {
  const Activation* x;  // [T, 2 I]
  int64_t x_stride;
  Activation* out;  // [T, I]
  int64_t out_stride;
  int T, I;
};

namespace cpu {
void silu_and_mul(const SiluAndMulParams<float>& p);
}  // namespace cpu
namespace cuda {
void silu_and_mul(const SiluAndMulParams<bf16>& p, Stream stream);
}  // namespace cuda

}  // namespace kimi
