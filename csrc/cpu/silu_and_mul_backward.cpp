#include "ops/silu_and_mul_backward.h"

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace kimi::cpu {

void silu_and_mul_backward(const SiluAndMulBackwardParams& p) {
  const Kernels& k = kernels();
  parallel_for(p.T, 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const float* x = p.x + t * p.x_stride;
      float* out = p.out + t * p.out_stride;
      k.silu_and_mul_backward(x, x + p.I, p.dout + t * p.dout_stride, out, out + p.I, p.I);
    }
  });
}

}  // namespace kimi::cpu
