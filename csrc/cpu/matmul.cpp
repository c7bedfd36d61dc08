#include "ops/matmul.h"

#include "core/parallel.h"
#include "cpu/float_blocks.h"

namespace kimi::cpu {
namespace {

constexpr int kSquare = 384;  // of a symmetric result
constexpr int kItems = 8;     // so many at least are wanted for the threads, if blocks need not become tiny for it
constexpr int kLeastRows = 96, kLeastColumns = 144;

// The blocks of B matrices [M, N].
struct Blocks {
  Cut rows, columns;

  Blocks(int B, int M, int N) : rows{M, kBlockRows}, columns{N, kPanelColumns} {
    while (B * count() < kItems) {
      if (rows.most > kLeastRows && std::min(rows.most, M) >= std::min(columns.most, N))
        rows = {M, rows.most / 2};
      else if (columns.most > kLeastColumns)
        columns = {N, columns.most / 2};
      else
        return;
    }
  }
  int64_t count() const { return int64_t(rows.count) * columns.count; }
};

// What lies above the diagonal of out [n, n] becomes what lies below it.
void mirror(const Kernels& k, float* out, int64_t stride, int n) {
  constexpr int kTile = 8;
  for (int r = 0; r < n; r += kTile) {
    const int rows = std::min(kTile, n - r);
    k.attention->transpose(out + r * stride, stride, rows, r, out + r, stride);
    for (int i = r; i < r + rows; i++)
      for (int j = r; j < i; j++) out[j * stride + i] = out[i * stride + j];
  }
}

void by_blocks(const Kernels& k, const MatmulParams& p) {
  const Blocks blocks(p.B, p.M, p.N);
  const Cut &rows = blocks.rows, &columns = blocks.columns;
  parallel_for(p.B * blocks.count(), 1, [&](int64_t item, int64_t) {
    Panels panels;
    const int64_t n = item / blocks.count(), i = item % rows.count, j = item % blocks.count() / rows.count;
    const int r = rows.begin(i), c = columns.begin(j);
    FloatMatrix a = p.a.from(r, 0), b = p.b.from(0, c);
    a.data += n * p.a_stride_b, b.data += n * p.b_stride_b;
    multiply_block(k, a, b, rows.length(i), columns.length(j), p.K, p.out + n * p.out_stride_b + r * p.out_stride + c,
                   p.out_stride, panels);
  });
}

// Blocks below the diagonal, row by row, then those on it, which have less to do.
void symmetric(const Kernels& k, const MatmulParams& p) {
  Cut cut{p.M, kSquare};
  const auto triangle = [&](int64_t count) { return count * (count - 1) / 2; };
  while (p.B * triangle(cut.count + 1) < kItems && cut.most > kLeastRows) cut = {p.M, cut.most / 2};
  const int64_t below = triangle(cut.count), blocks = triangle(cut.count + 1);
  parallel_for(p.B * blocks, 1, [&](int64_t item, int64_t) {
    Panels panels;
    const int64_t n = item / blocks;
    int64_t i = item % blocks - below, j = i;
    if (i < 0)
      for (i = 1, j = item % blocks; j >= i; i++) j -= i;
    const int r = cut.begin(i), c = cut.begin(j), height = cut.length(i), width = cut.length(j);
    FloatMatrix a = p.a.from(r, 0), b = p.b.from(0, c);
    a.data += n * p.a_stride_b, b.data += n * p.b_stride_b;
    float *const all = p.out + n * p.out_stride_b, *const out = all + r * p.out_stride + c;
    multiply_block(k, a, b, height, width, p.K, out, p.out_stride, panels, i == j);
    if (i == j)
      mirror(k, out, p.out_stride, height);
    else
      k.attention->transpose(out, p.out_stride, height, width, all + c * p.out_stride + r, p.out_stride);
  });
}

}  // namespace

void matmul(const MatmulParams& p) { p.symmetric ? symmetric(kernels(), p) : by_blocks(kernels(), p); }

}  // namespace kimi::cpu
