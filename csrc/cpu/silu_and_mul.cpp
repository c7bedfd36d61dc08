#include "ops/silu_and_mul.h"

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace kimi::cpu {

void silu_and_mul(const SiluAndMulParams<float>& p) {
  const Kernels& k = kernels();
  parallel_for(p.T, 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const float* x = p.x + t * p.x_stride;
      k.silu_and_mul(x, x + p.I, p.out + t * p.out_stride, p.I);
    }
  });
}

}  // namespace kimi::cpu
