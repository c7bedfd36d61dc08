#include "ops/moe_permute.h"

#include "cuda/sort_by_expert.cuh"

namespace kimi::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSlots = 8;  // rows of y that a thread has in flight

// A row is `width` parts, of eight elements where all rows allow 16-byte loads, else of one.

// Block (t, j) reads kThreads parts of row t of x once and writes them to each of the token's rows. The rows behind the
// last expert are shared out among the tokens.
template <class Part>
__global__ void __launch_bounds__(kThreads)
    moe_permute_kernel(const Part* __restrict__ x, int64_t x_stride, Part* __restrict__ permuted,
                       const int32_t* offsets, const int32_t* __restrict__ inverse, int T, int width, int K, int E) {
  const int64_t t = blockIdx.x, rows = int64_t(T) * K;
  const int c = blockIdx.y * kThreads + threadIdx.x;
  if (c >= width) return;
  const Part part = x[t * x_stride + c];
#pragma unroll 8
  for (int k = 0; k < K; ++k) {
    const int64_t row = inverse[t * K + k];
    if (row >= 0) permuted[row * width + c] = part;
  }
#pragma unroll 1  // the trip count of an unrolled loop would be a division
  for (int64_t row = offsets[E] + t; row < rows; row += T) permuted[row * width + c] = Part{};
}

// out += weight * part, element by element.
__device__ void add_weighted(float (&out)[8], float weight, const uint4& part) {
  float v[8];
  unpack8(part, v);
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] += weight * v[i];
}
__device__ void add_weighted(float (&out)[1], float weight, bf16 part) { out[0] += weight * to_float(part); }

// Block (t, j) sums kThreads parts of row t of out, slots in ascending order.
template <class Part>
__global__ void __launch_bounds__(kThreads)
    moe_unpermute_kernel(const Part* y, const float* weights, const int32_t* inverse, Part* out, int64_t out_stride,
                         int M, int width, int K) {
  const int64_t t = blockIdx.x;
  const int c = blockIdx.y * kThreads + threadIdx.x;
  if (c >= width) return;
  float sum[sizeof(Part) / sizeof(bf16)] = {};
  for (int first = 0; first < K; first += kSlots) {
    int row[kSlots];
    float weight[kSlots];
    Part part[kSlots];
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      row[j] = first + j < K ? inverse[t * K + first + j] : -1;
      if (row[j] >= M) row[j] = -1;
    }
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      part[j] = row[j] >= 0 ? y[int64_t(row[j]) * width + c] : Part{};
      weight[j] = row[j] >= 0 ? weights[t * K + first + j] : 0;
    }
#pragma unroll
    for (int j = 0; j < kSlots; ++j)
      if (row[j] >= 0) add_weighted(sum, weight[j], part[j]);  // the branch keeps the loads before it together
  }
  if constexpr (sizeof(Part) == 16)
    out[t * out_stride + c] = pack8(sum);
  else
    out[t * out_stride + c] = to_bf16(sum[0]);
}

// Blocks for T rows of `width` parts.
dim3 grid_of(int T, int width) { return dim3(T, ceil_div(width, kThreads)); }

uint4* parts(bf16* p) { return reinterpret_cast<uint4*>(p); }
const uint4* parts(const bf16* p) { return reinterpret_cast<const uint4*>(p); }

}  // namespace

void moe_permute(const MoePermuteParams<bf16>& p, Stream stream) {
  sort_by_expert(p.topk_ids, p.T * p.K, p.E, p.offsets, nullptr, p.inverse, stream);
  if (p.H % 8 == 0 && p.x_stride % 8 == 0 && aligned16(p.x) && aligned16(p.permuted))
    gpu::launch(moe_permute_kernel<uint4>, grid_of(p.T, p.H / 8), dim3(kThreads), 0, stream, parts(p.x), p.x_stride / 8,
                parts(p.permuted), p.offsets, p.inverse, p.T, p.H / 8, p.K, p.E);
  else
    gpu::launch(moe_permute_kernel<bf16>, grid_of(p.T, p.H), dim3(kThreads), 0, stream, p.x, p.x_stride, p.permuted,
                p.offsets, p.inverse, p.T, p.H, p.K, p.E);
}

void moe_unpermute(const MoeUnpermuteParams<bf16>& p, Stream stream) {
  if (p.H % 8 == 0 && p.out_stride % 8 == 0 && aligned16(p.y) && aligned16(p.out))
    gpu::launch(moe_unpermute_kernel<uint4>, grid_of(p.T, p.H / 8), dim3(kThreads), 0, stream, parts(p.y),
                p.topk_weights, p.inverse, parts(p.out), p.out_stride / 8, p.M, p.H / 8, p.K);
  else
    gpu::launch(moe_unpermute_kernel<bf16>, grid_of(p.T, p.H), dim3(kThreads), 0, stream, p.y, p.topk_weights,
                p.inverse, p.out, p.out_stride, p.M, p.H, p.K);
}

}  // namespace kimi::cuda
