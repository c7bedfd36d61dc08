// Packed INT4 to bf16, and float32 to packed INT4.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"
#include "ops/gemm_int4.h"

namespace kimi {

// out = bf16(q * scale), rounded once to nearest even.
struct DequantizeInt4Params {
  const int32_t* weight_packed;  // [out, in / 8]
  const bf16* weight_scale;      // [out, in / 32]
  bf16* out;                     // [out, in]
  int n_out, n_in;
};

// scale = bf16(max(absmax / 7, 1e-5)), q = clamp(rint(w / scale), -7, 7). A group with a non-finite value gets a NaN
// scale and q = 0, so that it stays visible.
struct QuantizeInt4Params {
  const float* weight;     // [out, in]
  int32_t* weight_packed;  // [out, in / 8]
  bf16* weight_scale;      // [out, in / 32]
  int n_out, n_in;
};

namespace cpu {
void dequantize_int4(const DequantizeInt4Params& p);
void quantize_int4(const QuantizeInt4Params& p);
}  // namespace cpu
namespace cuda {
void dequantize_int4(const DequantizeInt4Params& p, Stream stream);
void quantize_int4(const QuantizeInt4Params& p, Stream stream);
}  // namespace cuda

}  // namespace kimi
