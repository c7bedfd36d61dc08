#include "cuda/sort_by_expert.cuh"

#include <algorithm>
#include <string>

namespace kimi::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kRows = kWarps + 2;              // of counts: the pairs before the block's own, of each warp, behind
constexpr int kEach = kMaxExperts / kThreads;  // experts a thread sums up
constexpr int kBatch = 16;                     // ids a thread has in flight while it counts
constexpr int kMinChunk = 2 * kThreads;        // pairs a block

// count[e] += the pairs first .. last of expert e, by `threads` threads of which this is number `thread`.
__device__ void count_pairs(const int32_t* ids, int64_t first, int64_t last, int E, int* count, int thread,
                            int threads) {
  for (int64_t i = first + thread; i < last; i += kBatch * threads) {
    int id[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) id[j] = i + j * threads < last ? ids[i + j * threads] : -1;
#pragma unroll
    for (int j = 0; j < kBatch; ++j)
      if (unsigned(id[j]) < unsigned(E)) atomicAdd(&count[id[j]], 1);
  }
}

// The sum of v over the threads before this one.
__device__ int exclusive_sum(int v, int (&part)[kWarps]) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int sum = v;
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    const int before = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += before;
  }
  if (lane == kWarp - 1) part[warp] = sum;
  __syncthreads();
  return sum - v + warp_reduce(lane < warp ? part[lane] : 0, Add());
}

// Block b places the pairs b * chunk .. (b + 1) * chunk, each warp an equal part of them in order. It counts the other
// pairs as well, so that no block waits for another.
__global__ void __launch_bounds__(kThreads)
    sort_by_expert_kernel(const int32_t* __restrict__ ids, int pairs, int E, int64_t chunk, int32_t* offsets,
                          int32_t* pair_of_row, int32_t* row_of_pair) {
  GPU_SHARED(part, int[kWarps]);
  GPU_SHARED_DYNAMIC(dynamic, 16);
  int* const counts = reinterpret_cast<int*>(dynamic);  // [kRows, E], later the next row of each
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t begin = blockIdx.x * chunk, end = min(begin + chunk, int64_t(pairs));
  const int64_t first = min(begin + warp * (chunk / kWarps), end), last = min(first + chunk / kWarps, end);
  int* const mine = counts + (1 + warp) * E;

  for (int i = threadIdx.x; i < kRows * E; i += kThreads) counts[i] = 0;
  __syncthreads();
  count_pairs(ids, 0, begin, E, counts, threadIdx.x, kThreads);
  count_pairs(ids, first, last, E, mine, lane, kWarp);
  count_pairs(ids, end, pairs, E, counts + (kWarps + 1) * E, threadIdx.x, kThreads);
  __syncthreads();

  const int from = threadIdx.x * kEach, to = min(from + kEach, E);
  int total = 0;
  for (int e = from; e < to; ++e)
    for (int r = 0; r < kRows; ++r) total += counts[r * E + e];
  int at = exclusive_sum(total, part);
  for (int e = from; e < to; ++e) {
    if (blockIdx.x == 0) offsets[e] = at;
    for (int r = 0; r < kRows; ++r) {
      const int n = counts[r * E + e];
      counts[r * E + e] = at;
      at += n;
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == kThreads - 1) offsets[E] = at;
  __syncthreads();

  for (int64_t i = first + lane; i - lane < last; i += kWarp) {
    const int id = i < last ? ids[i] : -1;
    const bool valid = unsigned(id) < unsigned(E);
    const unsigned same = __match_any_sync(~0u, valid ? id : -1);
    const int before = __popc(same & ((1u << lane) - 1));
    const int row = valid ? mine[id] + before : -1;
    __syncwarp();  // all have read the expert's next row
    if (valid && before == 0) mine[id] += __popc(same);
    __syncwarp();
    if (i < last) row_of_pair[i] = row;
    if (pair_of_row && valid) pair_of_row[row] = int(i);
  }
}

}  // namespace

void sort_by_expert(const int32_t* ids, int pairs, int E, int32_t* offsets, int32_t* pair_of_row, int32_t* row_of_pair,
                    Stream stream) {
  if (E > kMaxExperts)
    throw gpu::Error("there are " + std::to_string(E) + " experts, expected at most " + std::to_string(kMaxExperts));
  const int64_t share = ceil_div(pairs, gpu::device().multiprocessors);
  const int64_t chunk = ceil_div(std::max<int64_t>(share, kMinChunk), kThreads) * int64_t(kThreads);
  const int blocks = std::max(1, ceil_div(pairs, int(chunk)));  // without pairs too: offsets are written
  gpu::launch(sort_by_expert_kernel, dim3(blocks), dim3(kThreads), sizeof(int) * kRows * E, stream, ids, pairs, E,
              chunk, offsets, pair_of_row, row_of_pair);
}

}  // namespace kimi::cuda
