#include "ops/grouped_gemm.h"

#include "core/parallel.h"
#include "cpu/matmul.h"

namespace kimi::cpu {

void grouped_gemm(const GroupedGemmParams<float>& p) {
  const Kernels& k = kernels();
  const ExpertWeights& w = p.experts;
  const int64_t rows = Blocks{1, w.n_out}.rows;  // an item is these of an expert, or fewer and larger ones
  parallel_for(w.E * rows, 1, [&](int64_t item, int64_t) {
    const int e = int(item / rows), first = p.offsets[e];
    const Blocks blocks{p.offsets[e + 1] - first, w.n_out};
    if (item % rows >= blocks.rows) return;
    with_expert(w, e, [&](const auto& matrix) {
      for (int64_t i = item % rows * blocks.tokens; i < (item % rows + 1) * blocks.tokens; i++)
        matmul_rows(k, p.x + first * p.x_stride, p.x_stride, blocks, i, matrix, p.out + first * p.out_stride,
                    p.out_stride);
    });
  });
  for (int64_t m = p.offsets[w.E]; m < p.M; m++) std::fill_n(p.out + m * p.out_stride, w.n_out, 0.0f);
}

void grouped_gemm_int4(const GroupedGemmParams<float>& p) { grouped_gemm(p); }

}  // namespace kimi::cpu
