// The plain version of the integer products. A row: per group its scale, then 32 integers.
#include <math.h>

#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

struct Group {
  float d;
  int16_t q[32];
};

size_t row_bytes(int n, int) { return (n / 32 * sizeof(Group) + 63) / 64 * 64; }

void quantize(const float* x, int n, int digits, void* row) {
  const float limit = digits == 1 ? 127 : 16319;
  auto* groups = static_cast<Group*>(row);
  for (int g = 0; g < n / 32; g++, x += 32) {
    float largest = 0;
    bool finite = true;
    for (int i = 0; i < 32; i++) {
      largest = fmaxf(largest, fabsf(x[i]));
      finite = finite && isfinite(x[i]);
    }
    const bool zero = largest < 1e-30f || !finite;  // below that, limit / largest could overflow
    groups[g].d = !finite ? NAN : zero ? 0 : largest / limit;
    for (int i = 0; i < 32; i++) groups[g].q[i] = zero ? 0 : int16_t(lrintf(x[i] * (limit / largest)));
  }
}

void dot(const void* const* x, int tokens, int, const uint8_t* w, int64_t w_stride, const bf16* scale,
         int64_t scale_stride, int rows, int n, float* out, int out_stride) {
  for (int t = 0; t < tokens; t++)
    for (int r = 0; r < rows; r++) {
      const auto* groups = static_cast<const Group*>(x[t]);
      const uint8_t* packed = w + r * w_stride;
      float sum = 0;
      for (int g = 0; g < n / 32; g++) {
        int products = 0;
        for (int i = 0; i < 32; i++) {
          const int at = 32 * g + i, weight = (packed[at / 2] >> (at % 2 * 4) & 15) - 8;
          products += weight * groups[g].q[i];
        }
        sum += float(products) * (groups[g].d * to_float(scale[r * scale_stride + g]));
      }
      out[t * out_stride + r] = sum;
    }
}

}  // namespace

const QuantizedKernels scalar_quantized_kernels = {.row_bytes = row_bytes, .quantize = quantize, .dot = dot};

}  // namespace kimi::cpu
