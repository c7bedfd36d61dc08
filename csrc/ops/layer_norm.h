// Layer normalisation: out = (x - mean) * rsqrt(mean((x - mean)^2) + eps) * weight + bias, over a row.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace kimi {

template <class Activation>
struct LayerNormParams {
  const Activation* x;  // [T, H]
  int64_t x_stride;     // between rows
  const bf16* weight;   // [H]
  const bf16* bias;     // [H]
  Activation* out;      // [T, H]
  int64_t out_stride;
  int T, H;
  float eps;
};

namespace cpu {
void layer_norm(const LayerNormParams<float>& p);
}  // namespace cpu
namespace cuda {
void layer_norm(const LayerNormParams<bf16>& p, Stream stream);
}  // namespace cuda

}  // namespace kimi
