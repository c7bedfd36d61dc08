// The plain version of the products with int8 weights.
#include <math.h>

#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

constexpr int kGroups = kInt8Block / 32;

void quantize(const float* x, int n, Int8Block* blocks, int64_t stride) {
  for (int g = 0; g < n / 32; g++, x += 32) {
    Int8Block& block = blocks[g / kGroups * stride];
    float largest = 0;
    bool finite = true;
    for (int i = 0; i < 32; i++) {
      largest = fmaxf(largest, fabsf(x[i]));
      finite = finite && isfinite(x[i]);
    }
    const bool zero = !finite || largest < 0x1p-100f;
    const int exponent = zero ? 0 : ilogbf(largest) - 14;
    block.d[g % kGroups] = !finite ? NAN : zero ? 0 : ldexpf(1, exponent);
    for (int i = 0; i < 32; i++) {
      const long q = zero ? 0 : lrintf(ldexpf(x[i], -exponent));
      block.q[g % kGroups * 32 + i] = int16_t(q > 32767 ? 32767 : q);
    }
  }
}

void dot(const Int8Block* x, int64_t x_stride, int tokens, const int8_t* w, const bf16* scale, int rows, int n,
         float* out, int64_t out_stride) {
  for (int t = 0; t < tokens; t++)
    for (int r = 0; r < rows; r++) {
      float sum = 0;
      for (int g = 0; g < n / 32; g++) {
        const Int8Block& block = x[g / kGroups * x_stride + t];
        const int8_t* weights = w + int64_t(r) * n + 32 * g;
        int products = 0;
        for (int i = 0; i < 32; i++) products += weights[i] * block.q[g % kGroups * 32 + i];
        sum += float(products) * (block.d[g % kGroups] * to_float(scale[int64_t(r) * (n / 32) + g]));
      }
      out[t * out_stride + r] = sum;
    }
}

}  // namespace

const Int8Kernels scalar_int8_kernels = {.quantize = quantize, .dot = dot};

}  // namespace kimi::cpu
