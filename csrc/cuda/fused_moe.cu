#include "ops/fused_moe.h"

#include "cuda/grouped_stream.cuh"
#include "cuda/grouped_tile.cuh"
#include "cuda/sort_by_expert.cuh"

namespace kimi::cuda {
namespace {

// ---- at most eight tokens: two launches, each of which finds out by itself which experts have tokens

constexpr int kFewPairs = 64;

struct Routes {                            // in shared memory
  int active;                              // experts with tokens
  int expert[kFewPairs];                   // they, ascending
  int pair[kFewPairs][kStreamTokens];      // [active, T] the token's first pair with the expert, or -1: its row of h
  float weight[kFewPairs][kStreamTokens];  // the router's, summed over the token's pairs with this expert
  int id[kFewPairs];                       // of each pair, or -1
  bool first[kFewPairs];                   // no pair before it has its expert
};

PTX_FN void find_routes(Routes& r, const FusedMoeParams<bf16>& p) {
  const int pairs = p.T * p.K, i = threadIdx.x;
  if (i == 0) r.active = 0;
  for (int j = i; j < kFewPairs * kStreamTokens; j += kStreamThreads) r.pair[j / kStreamTokens][j % kStreamTokens] = -1;
  if (i < pairs) {
    const int id = p.topk_ids[i];
    r.id[i] = unsigned(id) < unsigned(p.E) ? id : -1;
  }
  __syncthreads();
  if (i < pairs) {
    bool first = r.id[i] >= 0;
    for (int j = 0; j < i; ++j) first = first && r.id[j] != r.id[i];
    r.first[i] = first;
  }
  __syncthreads();
  if (i < pairs && r.id[i] >= 0) {
    const int id = r.id[i], t = i / p.K;
    int rank = 0;
    for (int j = 0; j < pairs; ++j) rank += r.first[j] && r.id[j] < id;
    if (r.first[i]) r.expert[rank] = id, atomicAdd(&r.active, 1);
    bool first = true;
    float weight = 0;
    for (int j = t * p.K; j < (t + 1) * p.K; ++j)
      if (r.id[j] == id) first = first && j >= i, weight += p.topk_weights[j];
    if (first) r.pair[rank][t] = i, r.weight[rank][t] = weight;
  }
  __syncthreads();
}

// h[pair] = router weight * silu(gate_e x) * up_e x
struct GateUpWork {
  const FusedMoeParams<bf16>& p;
  const Routes& routes;
  bf16* h;  // [T * K, I]
  int row_tiles;
  bool vector;

  PTX_FN int tiles() const { return routes.active * row_tiles; }
  PTX_FN int segments() const { return 1; }
  PTX_FN int n_in() const { return p.H; }
  PTX_FN int n_out() const { return p.I; }
  PTX_FN bool x_vector() const { return vector; }
  PTX_FN void source(int tile, int, int m, const void*& weight, const bf16*& scale, int& row) const {
    const int e = routes.expert[tile / row_tiles];
    const ExpertWeights& w = m == 0 ? p.gate : p.up;
    weight = w.weight[e], scale = w.scale[e], row = tile % row_tiles * kStreamRows;
  }
  PTX_FN const bf16* column(int tile, int, int n) const {
    return routes.pair[tile / row_tiles][n] < 0 ? nullptr : p.x + n * p.x_stride;
  }
  PTX_FN void store(int tile, int r, int n, const float (&sums)[kStreamTiles]) const {
    const int a = tile / row_tiles, row = tile % row_tiles * kStreamRows + r;
    if (routes.pair[a][n] >= 0 && row < p.I)
      h[int64_t(routes.pair[a][n]) * p.I + row] = to_bf16(silu(sums[0]) * sums[1] * routes.weight[a][n]);
  }
};

// out[t] = sum over all experts, ascending, of down_e h: one sum whose inputs are those of every expert in a row.
struct DownWork {
  static constexpr int kRows = kStreamTiles * kStreamRows;
  const FusedMoeParams<bf16>& p;
  const Routes& routes;
  const bf16* h;
  bool vector;

  PTX_FN int tiles() const { return parts_of(p.H, kRows); }
  PTX_FN int segments() const { return routes.active; }
  PTX_FN int n_in() const { return p.I; }
  PTX_FN int n_out() const { return p.H; }
  PTX_FN bool x_vector() const { return vector; }
  PTX_FN void source(int tile, int segment, int m, const void*& weight, const bf16*& scale, int& row) const {
    const int e = routes.expert[segment];
    weight = p.down.weight[e], scale = p.down.scale[e], row = tile * kRows + m * kStreamRows;
  }
  PTX_FN const bf16* column(int, int segment, int n) const {
    const int pair = routes.pair[segment][n];
    return pair < 0 ? nullptr : h + int64_t(pair) * p.I;
  }
  PTX_FN void store(int tile, int r, int n, const float (&sums)[kStreamTiles]) const {
    if (n >= p.T) return;
#pragma unroll
    for (int m = 0; m < kStreamTiles; ++m)
      if (const int row = tile * kRows + m * kStreamRows + r; row < p.H) {
        bf16& out = p.out[n * p.out_stride + row];
        out = to_bf16(p.accumulate ? to_float(out) + sums[m] : sums[m]);
      }
  }
};

__global__ void __launch_bounds__(kStreamThreads, 2)
    fused_moe_gate_up_kernel(FusedMoeParams<bf16> p, bf16* h, bool vector) {
  GPU_SHARED_DYNAMIC(shared, 16);
  GPU_SHARED(routes, Routes);
  GPU_SHARED(part, float[kStreamPart]);
  find_routes(routes, p);
  const GateUpWork work{p, routes, h, parts_of(p.I, kStreamRows), vector};
  WeightStream<GateUpWork>(work, reinterpret_cast<StreamStage*>(shared)).run(part);
}

__global__ void __launch_bounds__(kStreamThreads, 2)
    fused_moe_down_kernel(FusedMoeParams<bf16> p, const bf16* h, bool vector) {
  GPU_SHARED_DYNAMIC(shared, 16);
  GPU_SHARED(routes, Routes);
  GPU_SHARED(part, float[kStreamPart]);
  find_routes(routes, p);
  const DownWork work{p, routes, h, vector};
  WeightStream<DownWork>(work, reinterpret_cast<StreamStage*>(shared)).run(part);
}

bool few(const FusedMoeParams<bf16>& p) {
  return p.T <= kStreamTokens && p.T * p.K <= kFewPairs && p.gate.scale && p.up.scale && p.down.scale;
}

void run_few(const FusedMoeParams<bf16>& p, bf16* h, Stream stream) {
  const int64_t tiles = int64_t(p.T) * p.K * parts_of(p.I, kStreamRows);
  gpu::launch(fused_moe_gate_up_kernel, stream_grid(tiles, kStreamShared), dim3(kStreamThreads), kStreamShared, stream,
              p, h, rows_aligned(p.x, p.x_stride, p.H));
  const int64_t out_tiles = p.T ? parts_of(p.H, DownWork::kRows) : 0;
  gpu::launch(fused_moe_down_kernel, stream_grid(out_tiles, kStreamShared), dim3(kStreamThreads), kStreamShared, stream,
              p, h, rows_aligned(h, p.I, p.I));
}

// ---- many tokens: sort, gate and up, down, sum

constexpr int kCombineThreads = 256;

// out[t] = sum over k of y[row_of_pair[t, k]], with accumulate from out[t] on, eight elements a thread or one.
template <bool Vector>
__global__ void __launch_bounds__(kCombineThreads)
    fused_moe_combine_kernel(const bf16* y, const int32_t* row_of_pair, bf16* out, int64_t out_stride, int H, int K,
                             bool accumulate) {
  constexpr int kStep = Vector ? 8 : 1;
  const int64_t t = blockIdx.x;
  const int i = (blockIdx.y * kCombineThreads + threadIdx.x) * kStep;
  if (i >= H) return;
  bf16* const sums = out + t * out_stride + i;
  float sum[8] = {};
  if (accumulate) {
    if constexpr (Vector)
      unpack8(*reinterpret_cast<const uint4*>(sums), sum);
    else
      sum[0] = to_float(*sums);
  }
#pragma unroll 4
  for (int k = 0; k < K; ++k) {
    const int64_t row = row_of_pair[t * K + k];
    if (row < 0) continue;
    float v[8];
    if constexpr (Vector)
      unpack8(*reinterpret_cast<const uint4*>(y + row * H + i), v);
    else
      v[0] = to_float(y[row * H + i]);
#pragma unroll
    for (int j = 0; j < kStep; ++j) sum[j] += v[j];
  }
  if constexpr (Vector)
    *reinterpret_cast<uint4*>(sums) = pack8(sum);
  else
    *sums = to_bf16(sum[0]);
}

struct Workspace {
  bf16* h = nullptr;               // [M, I] router weight * silu(gate x) * up x, rows sorted by expert; or by pair
  bf16* y = nullptr;               // [M, H] down h
  int32_t* offsets = nullptr;      // [E + 1]
  int32_t* pair_of_row = nullptr;  // [M]
  int32_t* row_of_pair = nullptr;  // [M]
  size_t floats = 0;

  explicit Workspace(const FusedMoeParams<bf16>& p) {
    const int64_t M = int64_t(p.T) * p.K;
    const auto take = [&](auto*& at, int64_t n) {
      if (p.workspace) at = reinterpret_cast<std::remove_reference_t<decltype(at)>>(p.workspace + floats);
      floats +=
          (n * sizeof(*at) + 15) / 16 * 4;  // what follows starts at a multiple of 16 bytes, if the workspace does
    };
    take(h, M * p.I);
    if (few(p)) return;
    take(y, M * p.H);
    take(offsets, p.E + 1);
    take(pair_of_row, M);
    take(row_of_pair, M);
  }
};

void run_gate_up(const Grouped& g, Stream stream) {
  const int64_t rows = g.M / g.E;
  if (!g.w[0].int4)
    launch_tiles<Bf16Tile, 32, true>(g, stream);
  else if (rows <= 4)
    launch_stream<true>(g, stream);
  else if (rows <= 32)
    launch_tiles<Int4Tile, 32, true>(g, stream);
  else
    launch_tiles<Int4Tile, 128, true>(g, stream);
}

void run_many(const FusedMoeParams<bf16>& p, const Workspace& s, Stream stream) {
  const int M = p.T * p.K;
  sort_by_expert(p.topk_ids, M, p.E, s.offsets, s.pair_of_row, s.row_of_pair, stream);
  const bool h_aligned = rows_aligned(s.h, p.I, p.I), y_aligned = rows_aligned(s.y, p.H, p.H);
  run_gate_up({.x = p.x,
               .x_stride = p.x_stride,
               .offsets = s.offsets,
               .pair = s.pair_of_row,
               .weights = p.topk_weights,
               .K = p.K,
               .w = {projection(p.gate), projection(p.up)},
               .out = s.h,
               .out_stride = p.I,
               .M = M,
               .E = p.E,
               .x_vector = rows_aligned(p.x, p.x_stride, p.H),
               .out_vector = h_aligned},
              stream);
  run_grouped({.x = s.h,
               .x_stride = p.I,
               .offsets = s.offsets,
               .w = {projection(p.down)},
               .out = s.y,
               .out_stride = p.H,
               .M = M,
               .E = p.E,
               .x_vector = h_aligned,
               .out_vector = y_aligned},
              stream);
  const bool vector = y_aligned && rows_aligned(p.out, p.out_stride, p.H);
  gpu::launch(vector ? fused_moe_combine_kernel<true> : fused_moe_combine_kernel<false>,
              dim3(p.T, ceil_div(vector ? p.H / 8 : p.H, kCombineThreads)), dim3(kCombineThreads), 0, stream, s.y,
              s.row_of_pair, p.out, p.out_stride, p.H, p.K, p.accumulate);
}

}  // namespace

size_t fused_moe_workspace(const FusedMoeParams<bf16>& p) { return Workspace(p).floats; }

void fused_moe(const FusedMoeParams<bf16>& p, Stream stream) {
  const Workspace s(p);
  if (few(p))
    run_few(p, s.h, stream);
  else
    run_many(p, s, stream);
}

}  // namespace kimi::cuda
