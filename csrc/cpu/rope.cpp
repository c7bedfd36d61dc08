#include "ops/rope.h"

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace kimi::cpu {

void rope(const RopeParams<float>& p) {
  const Kernels& k = kernels();
  const int64_t pairs = p.R / 2;
  parallel_for(p.T, 8, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const float* cos = p.cos + p.positions[t] * pairs;
      const float* sin = p.sin + p.positions[t] * pairs;
      for (int n = 0; n < p.N; n++)
        k.rope(p.x + t * p.x_stride_t + n * p.x_stride_n, cos, sin, p.out + t * p.out_stride_t + n * p.out_stride_n,
               pairs);
    }
  });
}

}  // namespace kimi::cpu
