// Gaussian error linear unit of x + bias: out = v * Phi(v) with v = x + bias, Phi by erf or by tanh.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace kimi {

template <class Activation>
struct GeluParams {
  const Activation* x;  // [T, I]
  int64_t x_stride;     // between rows
  const bf16* bias;     // [I], or null
  Activation* out;      // [T, I]
  int64_t out_stride;
  int T, I;
  bool tanh;
};

namespace cpu {
void gelu(const GeluParams<float>& p);
}  // namespace cpu
namespace cuda {
void gelu(const GeluParams<bf16>& p, Stream stream);
}  // namespace cuda

}  // namespace kimi
