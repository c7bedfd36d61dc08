#include "ops/grouped_gemm.h"

#include "core/parallel.h"
#include "cpu/matmul.h"

namespace kimi::cpu {

void grouped_gemm(const GroupedGemmParams<float>& p) {
  const Kernels& k = kernels();
  const ExpertWeights& w = p.experts;
  const int64_t blocks = (w.n_out + kBlockRows - 1) / kBlockRows;
  parallel_for(w.E * blocks, 1, [&](int64_t item, int64_t) {
    const int e = int(item / blocks), row = int(item % blocks) * kBlockRows;
    const int first = p.offsets[e], tokens = p.offsets[e + 1] - first, rows = std::min(kBlockRows, w.n_out - row);
    with_expert(w, e, [&](const auto& matrix) {
      matmul_rows(k, p.x + first * p.x_stride, p.x_stride, tokens, matrix, row, rows, p.out + first * p.out_stride,
                  p.out_stride);
    });
  });
  for (int64_t m = p.offsets[w.E]; m < p.M; m++) std::fill_n(p.out + m * p.out_stride, w.n_out, 0.0f);
}

void grouped_gemm_int4(const GroupedGemmParams<float>& p) { grouped_gemm(p); }

}  // namespace kimi::cpu
