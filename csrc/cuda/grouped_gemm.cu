#include "ops/grouped_gemm.h"

#include "cuda/grouped_stream.cuh"
#include "cuda/grouped_tile.cuh"

namespace kimi::cuda {

// Tile by the rows that an expert has on average: to 4 reading the weights is all; then tiles of 32 and 128 rows.
void run_grouped(const Grouped& p, Stream stream) {
  const int64_t rows = p.M / p.E;
  if (!p.w[0].int4)
    launch_tiles<Bf16Tile, 32, false>(p, stream);
  else if (rows <= 4 || p.M <= 16)
    launch_stream<false>(p, stream);
  else if (rows <= 32)
    launch_tiles<Int4Tile, 32, false>(p, stream);
  else
    launch_tiles<Int4Tile, 128, false>(p, stream);
}

namespace {

void run(const GroupedGemmParams<bf16>& p, Stream stream) {
  const auto& w = p.experts;
  run_grouped({.x = p.x,
               .x_stride = p.x_stride,
               .offsets = p.offsets,
               .w = {projection(w)},
               .out = p.out,
               .out_stride = p.out_stride,
               .M = p.M,
               .E = w.E,
               .x_vector = rows_aligned(p.x, p.x_stride, w.n_in),
               .out_vector = rows_aligned(p.out, p.out_stride, w.n_out)},
              stream);
}

}  // namespace

void grouped_gemm(const GroupedGemmParams<bf16>& p, Stream stream) { run(p, stream); }
void grouped_gemm_int4(const GroupedGemmParams<bf16>& p, Stream stream) { run(p, stream); }

}  // namespace kimi::cuda
