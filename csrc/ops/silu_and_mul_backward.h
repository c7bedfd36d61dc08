// The gradient of SwiGLU's gate: with s = 1 / (1 + exp(-gate)), d gate = dout * up * s * (1 + gate * (1 - s)) and
// d up = dout * gate * s.
#pragma once
#include <cstdint>

namespace kimi {

struct SiluAndMulBackwardParams {
  const float* x;  // [T, 2 I]: gate, up
  int64_t x_stride;
  const float* dout;  // [T, I]
  int64_t dout_stride;
  float* out;  // [T, 2 I]: d gate, d up
  int64_t out_stride;
  int T, I;
};

namespace cpu {
void silu_and_mul_backward(const SiluAndMulBackwardParams& p);
}  // namespace cpu

}  // namespace kimi
