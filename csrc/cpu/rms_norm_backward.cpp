#include "ops/rms_norm_backward.h"

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace kimi::cpu {

void rms_norm_backward(const RmsNormBackwardParams& p) {
  constexpr int64_t kColumns = 512;  // of dweight that a thread sums at a time
  const Kernels& k = kernels();
  parallel_for(p.T, kBackwardRows, [&](int64_t begin, int64_t end) {
    float* sums = p.workspace + begin / kBackwardRows * p.H;
    std::fill_n(sums, p.H, 0.0f);
    for (int64_t t = begin; t < end; t++)
      k.rms_norm_backward(p.x + t * p.x_stride, p.weight, p.dout + t * p.dout_stride, p.eps, p.dx + t * p.H, sums, p.H);
  });
  parallel_for(p.H, kColumns, [&](int64_t begin, int64_t end) {
    std::fill(p.dweight + begin, p.dweight + end, 0.0f);
    for (int64_t t = 0; t < p.T; t += kBackwardRows)
      k.add_scaled(p.dweight + begin, 1.0f, p.workspace + t / kBackwardRows * p.H + begin, end - begin);
  });
}

}  // namespace kimi::cpu
