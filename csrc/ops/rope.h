// Rotary embedding of interleaved pairs: (a, b) -> (a cos - b sin, a sin + b cos).
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace kimi {

template <class Activation>
struct RopeParams {
  const Activation* x;  // [T, N, R]
  int64_t x_stride_t, x_stride_n;
  const float* cos;          // [P, R / 2]
  const float* sin;          // [P, R / 2]
  const int32_t* positions;  // [T], each in [0, P)
  Activation* out;           // [T, N, R]; may be x
  int64_t out_stride_t, out_stride_n;
  int T, N, R, P;
};

namespace cpu {
void rope(const RopeParams<float>& p);
}  // namespace cpu
namespace cuda {
void rope(const RopeParams<bf16>& p, Stream stream);
}  // namespace cuda

}  // namespace kimi
