#include "ops/layer_norm.h"

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace kimi::cpu {

void layer_norm(const LayerNormParams<float>& p) {
  const Kernels& k = kernels();
  parallel_for(p.T, 8, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      k.layer_norm(p.x + t * p.x_stride, p.weight, p.bias, p.eps, p.out + t * p.out_stride, p.H);
  });
}

}  // namespace kimi::cpu
