// out = x @ weight^T with packed INT4 weights; q * scale stays exact in float32.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace kimi {

constexpr int kInt4Group = 32;  // inputs that share a scale

template <class Activation>
struct GemmInt4Params {
  const Activation* x;  // [T, in]
  int64_t x_stride;
  const int32_t* weight_packed;  // [out, in / 8], low nibble first, value = nibble - 8
  const bf16* weight_scale;      // [out, in / 32]
  Activation* out;               // [T, out]
  int64_t out_stride;
  int T, n_in, n_out;
};

namespace cpu {
void gemm_int4(const GemmInt4Params<float>& p);
}  // namespace cpu
namespace cuda {
void gemm_int4(const GemmInt4Params<bf16>& p, Stream stream);
}  // namespace cuda

}  // namespace kimi
