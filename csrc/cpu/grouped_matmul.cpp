#include "ops/grouped_matmul.h"

#include "core/parallel.h"
#include "cpu/float_blocks.h"

namespace kimi::cpu {
namespace {

// The rows of a group times its matrix.
void each_row(const Kernels& k, const GroupedMatmulParams& p) {
  int longest = 0;
  for (int e = 0; e < p.E; e++) longest = std::max(longest, p.offsets[e + 1] - p.offsets[e]);
  const Cut columns{p.N, kPanelColumns};
  const int64_t blocks = int64_t(Cut{longest, kBlockRows}.count) * columns.count;  // a shorter group has fewer
  parallel_for(p.E * blocks, 1, [&](int64_t item, int64_t) {
    const int64_t e = item / blocks, i = item % blocks / columns.count, j = item % columns.count;
    const Cut rows{p.offsets[e + 1] - p.offsets[e], kBlockRows};
    if (i >= rows.count) return;
    Panels panels;
    const int64_t r = p.offsets[e] + rows.begin(i), c = columns.begin(j);
    FloatMatrix b = p.b.from(0, c);
    b.data += e * p.b_stride_e;
    multiply_block(k, p.a.from(r, 0), b, rows.length(i), columns.length(j), p.K, p.out + r * p.out_stride + c,
                   p.out_stride, panels);
  });
  for (int64_t m = p.offsets[p.E]; m < p.M; m++) std::fill_n(p.out + m * p.out_stride, p.N, 0.0f);
}

// Columns of a times rows of b, those of a group.
void sum_rows(const Kernels& k, const GroupedMatmulParams& p) {
  const Cut rows{p.K, kBlockRows}, columns{p.N, kPanelColumns};
  const int64_t blocks = int64_t(rows.count) * columns.count;
  parallel_for(p.E * blocks, 1, [&](int64_t item, int64_t) {
    Panels panels;
    const int64_t e = item / blocks, i = item % blocks / columns.count, j = item % columns.count;
    const int first = p.offsets[e], r = rows.begin(i), c = columns.begin(j);
    multiply_block(k, p.a.from(r, first), p.b.from(first, c), rows.length(i), columns.length(j),
                   p.offsets[e + 1] - first, p.out + e * p.out_stride_e + r * p.out_stride + c, p.out_stride, panels);
  });
}

}  // namespace

void grouped_matmul(const GroupedMatmulParams& p) { p.sum_rows ? sum_rows(kernels(), p) : each_row(kernels(), p); }

}  // namespace kimi::cpu
