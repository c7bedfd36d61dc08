#include "ops/moe_permute.h"

#include <algorithm>

#include "core/parallel.h"
#include "cpu/kernels.h"
#include "cpu/sort_by_expert.h"

namespace kimi::cpu {

void moe_permute(const MoePermuteParams<float>& p) {
  const int M = p.T * p.K;
  sort_by_expert(p.topk_ids, M, p.E, p.offsets, p.inverse);
  parallel_for(M, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      if (p.inverse[i] >= 0) std::copy_n(p.x + i / p.K * p.x_stride, p.H, p.permuted + int64_t(p.inverse[i]) * p.H);
  });
  std::fill(p.permuted + int64_t(p.offsets[p.E]) * p.H, p.permuted + int64_t(M) * p.H, 0.0f);
}

void moe_unpermute(const MoeUnpermuteParams<float>& p) {
  const Kernels& k = kernels();
  parallel_for(p.T, 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      float* out = p.out + t * p.out_stride;
      std::fill(out, out + p.H, 0.0f);
      for (int64_t i = t * p.K; i < (t + 1) * p.K; i++) {
        if (p.inverse[i] >= 0) k.add_scaled(out, p.topk_weights[i], p.y + int64_t(p.inverse[i]) * p.H, p.H);
      }
    }
  });
}

}  // namespace kimi::cpu
