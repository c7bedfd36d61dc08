#include "ops/gelu.h"

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace kimi::cpu {

void gelu(const GeluParams<float>& p) {
  const Kernels& k = kernels();
  const auto gelu_row = p.tanh ? k.gelu_tanh : k.gelu_erf;
  parallel_for(p.T, 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) gelu_row(p.x + t * p.x_stride, p.bias, p.out + t * p.out_stride, p.I);
  });
}

}  // namespace kimi::cpu
