#include "ops/mla_prefill.h"

#include "cuda/device.cuh"

namespace kimi::cuda {
namespace {

using Params = MlaPrefillParams<bf16>;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Consecutive queries of one sequence and the keys they may see.
struct Queries {
  int first, count;  // rows of q; none if count is 0
  int key, keys;     // rows of kv
  int visible;       // keys that query `first` sees, where positive; each later one sees one more, up to `keys`
  bool bad;          // the keys do not exist: the results are NaN

  PTX_FN int sees(int i) const { return min(max(visible + i, 0), keys); }
};

// The block of at most `rows` queries with this number, blocks counted sequence by sequence. A sequence whose queries
// do not exist has none. The whole warp; every lane gets the result.
PTX_FN Queries find_queries(const Params& p, int rows, int number) {
  const int lane = threadIdx.x % kWarp;
  for (int base = 0; base < p.B; base += kWarp) {
    const int b = base + lane;
    int first = 0, count = 0;
    if (b < p.B) {
      const int begin = p.cu_seqlens_q[b], end = p.cu_seqlens_q[b + 1];
      if (0 <= begin && begin <= end && end <= p.T) first = begin, count = end - begin;
    }
    const unsigned blocks = unsigned(count + rows - 1) / rows;
    unsigned sum = blocks;  // over this and the lower lanes
#pragma unroll
    for (int d = 1; d < kWarp; d *= 2) {
      const unsigned below = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += below;
    }
    const unsigned block = unsigned(number) - (sum - blocks);
    const unsigned hits = __ballot_sync(~0u, block < blocks);
    if (!hits) {
      number -= int(__shfl_sync(~0u, sum, kWarp - 1));
      continue;
    }
    const int hit = __ffs(int(hits)) - 1, begin = int(__shfl_sync(~0u, block, hit)) * rows;
    first = __shfl_sync(~0u, first, hit) + begin, count = __shfl_sync(~0u, count, hit) - begin;
    const int sequence = base + hit, key = p.cu_seqlens_k[sequence], end = p.cu_seqlens_k[sequence + 1];
    const bool bad = !(0 <= key && key <= end && end <= p.S);
    const int keys = bad ? 0 : end - key;
    const int64_t visible = int64_t(begin) + p.causal_offsets[sequence] + 1;
    return {first, min(count, rows), key, keys, int(max(int64_t(-rows), min(visible, int64_t(keys)))), bad};
  }
  return {};
}

// How a query's result over these keys joins what `lse_before` belongs to: out = here * sum(weights * values) +
// before * out_before. The largest score is given times log2(e), sum is of exp(score - largest).
struct Join {
  float here, before, lse;
};
PTX_FN Join join(float largest, float sum, float lse_before) {
  const float lse = sum == 0 ? -INFINITY : (largest + log2f(sum)) * kLn2, scale = sum == 0 ? 0.0f : 1.0f / sum;
  if (lse_before == -INFINITY) return {scale, 0, lse};
  const float top = fmaxf(lse, lse_before);
  const float here = ptx::exp2_approx((lse - top) * kLog2E), before = ptx::exp2_approx((lse_before - top) * kLog2E);
  const float total = here + before;
  return {scale * here / total, before / total, top + log2f(total) * kLn2};
}

// Any shape: a block a query and head, 128 keys at a time, a thread a key for the scores and a column for the values.
// Columns past the first pass compute the scores again.
__global__ void __launch_bounds__(kThreads) mla_prefill_plain_kernel(Params p) {
  constexpr int kColumns = 4;  // a thread
  GPU_SHARED(weight, float[kThreads]);
  GPU_SHARED(part, float[kWarps]);
  const int n = blockIdx.x % p.N, width = p.Dn + p.R;
  const Queries at = find_queries(p, 1, blockIdx.x / p.N);
  if (at.count == 0) return;
  const int keys = at.sees(0);
  const int64_t row = int64_t(at.first) * p.N + n;
  const bf16* q = p.q + at.first * p.q_stride_t + n * p.q_stride_n;
  const float scale = p.scale * kLog2E, lse_before = p.continue_state ? p.lse[row] : -INFINITY;
  Join joined{};

  for (int pass = 0; pass < p.Dv; pass += kThreads * kColumns) {
    float value[kColumns] = {}, largest = -INFINITY, sum = at.bad ? NAN : 0.0f;
    for (int first = 0; first < keys; first += kThreads) {
      const int count = min(kThreads, keys - first);
      float score = -INFINITY;
      if (int(threadIdx.x) < count) {
        const int64_t key = at.key + first + threadIdx.x;
        const bf16 *nope = p.kv + key * p.kv_stride_s + n * p.kv_stride_n, *pe = p.k_pe + key * p.k_pe_stride;
        score = 0;
        for (int i = 0; i < p.Dn; ++i) score += to_float(q[i]) * to_float(nope[i]);
        for (int i = p.Dn; i < width; ++i) score += to_float(q[i]) * to_float(pe[i - p.Dn]);
        score *= scale;
      }
      const float top = fmaxf(largest, block_reduce<kThreads>(score, -INFINITY, part, Max()));
      const float base = top == -INFINITY ? 0.0f : top, shrink = ptx::exp2_approx(largest - base);
      weight[threadIdx.x] = int(threadIdx.x) < count ? ptx::exp2_approx(score - base) : 0.0f;
      sum = sum * shrink + block_reduce<kThreads>(weight[threadIdx.x], 0.0f, part, Add());
      largest = top;
      for (int c = 0; c < kColumns; ++c) {
        const int column = pass + c * kThreads + threadIdx.x;
        value[c] *= shrink;
        if (column >= p.Dv) continue;
        const bf16* v = p.kv + (at.key + first) * p.kv_stride_s + n * p.kv_stride_n + p.Dn + column;
        for (int j = 0; j < count; ++j) value[c] += weight[j] * to_float(v[j * p.kv_stride_s]);
      }
      __syncthreads();  // before the next weights
    }
    joined = join(largest == -INFINITY ? 0.0f : largest, sum, lse_before);
    for (int c = 0; c < kColumns; ++c) {
      const int column = pass + c * kThreads + threadIdx.x;
      if (column >= p.Dv) continue;
      bf16* out = p.out + row * p.Dv + column;
      *out = to_bf16(joined.here * value[c] + (joined.before != 0 ? joined.before * to_float(*out) : 0.0f));
    }
  }
  __syncthreads();  // before lse changes that all have read
  if (threadIdx.x == 0) p.lse[row] = joined.lse;
}

}  // namespace

void mla_prefill(const Params& p, Stream stream) {
  gpu::launch(mla_prefill_plain_kernel, dim3(unsigned(p.T) * p.N), dim3(kThreads), 0, stream, p);
}

}  // namespace kimi::cuda
