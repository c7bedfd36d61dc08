#include "ops/attention.h"

#include "core/parallel.h"
#include "cpu/attend.h"

namespace kimi::cpu {
namespace {

static_assert((2 * kMaxAttentionWidth + 2) * kLanes <= kScratch && 2 * kMaxAttentionWidth <= kPanel);

// Head n, `count` queries from token `first` on, keys [key, key_end).
void attend_block(const Kernels& k, const AttentionParams<float>& p, int n, int64_t first, int count, int64_t key,
                  int64_t key_end) {
  alignas(64) float scratch[kScratch];
  Strip strips[kMaxStrips];
  const int D = p.D, n_strips = (count + kLanes - 1) / kLanes;
  const int64_t stride = int64_t(p.N) * D;
  const auto queries = [&](int i) { return std::min(kLanes, count - i * kLanes); };
  for (int i = 0; i < n_strips; i++) {
    float* q = scratch + i * (D * kLanes + State::size(D));
    strips[i].q = q;
    strips[i].state = State(q + D * kLanes, D);
    strips[i].state.clear(D);
    std::fill_n(strips[i].limit, kLanes, key_end - key);
    if (queries(i) < kLanes) std::fill_n(q, D * kLanes, 0.0f);
    k.attention->transpose(p.q + (first + i * kLanes) * p.q_stride_t + n * p.q_stride_n, p.q_stride_t, queries(i), D, q,
                           kLanes);
  }
  const float* keys = p.k + key * p.k_stride_t + n * p.k_stride_n;
  const float* values = p.v + key * p.v_stride_t + n * p.v_stride_n;
  attend(k, strips, n_strips, {2 * D, D, D, D}, p.scale, key_end - key, [&](int64_t j, float* out) {
    std::copy_n(values + j * p.v_stride_t, D, std::copy_n(keys + j * p.k_stride_t, D, out));
  });
  for (int i = 0; i < n_strips; i++)
    strips[i].state.store(k, D, queries(i), p.out + (first + i * kLanes) * stride + n * D, stride);
}

}  // namespace

void attention(const AttentionParams<float>& p) {
  const Kernels& k = kernels();
  const int block = strips_in_scratch(2 * p.D + 2) * kLanes;
  const auto items_of = [&](int b) {  // blocks of all heads of a sequence
    return p.N * ((int64_t(p.cu_seqlens[b + 1]) - p.cu_seqlens[b] + block - 1) / block);
  };
  int64_t items = 0;
  for (int b = 0; b < p.B; b++) items += items_of(b);
  parallel_for(items, 1, [&](int64_t item, int64_t) {
    int b = 0;
    for (; item >= items_of(b); b++) item -= items_of(b);
    // The blocks of one head follow each other: its keys and values stay in the cache.
    const int64_t begin = p.cu_seqlens[b], end = p.cu_seqlens[b + 1], blocks = items_of(b) / p.N;
    const int64_t first = begin + item % blocks * block;
    attend_block(k, p, int(item / blocks), first, int(std::min<int64_t>(block, end - first)), begin, end);
  });
}

}  // namespace kimi::cpu
