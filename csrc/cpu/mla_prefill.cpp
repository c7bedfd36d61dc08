#include "ops/mla_prefill.h"

#include "core/parallel.h"
#include "cpu/attend.h"

namespace kimi::cpu {
namespace {

static_assert((kMaxMlaPrefillWidth + 2) * kLanes <= kScratch && kMaxMlaPrefillWidth <= kPanel);

// Brings queries [first, first + count) of head n and the results that they continue into lanes. The running state of
// a query whose result over other keys is (out, lse): maximum = lse, sum = 1; where the maximum itself is wanted, sum =
// exp(lse - maximum) and out times that.
void load_strip(const Kernels& k, const MlaPrefillParams<float>& p, int64_t first, int count, int n, float* q,
                const Strip& strip) {
  const State& s = strip.state;
  const int key_dim = p.Dn + p.R;
  if (count < kLanes) std::fill_n(q, key_dim * kLanes, 0.0f);
  k.attention->transpose(p.q + first * p.q_stride_t + n * p.q_stride_n, p.q_stride_t, count, key_dim, q, kLanes);
  s.clear(p.Dv);
  if (!p.continue_state) return;
  const int64_t stride = int64_t(p.N) * p.Dv;
  k.attention->transpose(p.out + first * stride + n * p.Dv, stride, count, p.Dv, s.out, kLanes);
  for (int r = 0; r < count; r++) {
    const float lse = p.lse[(first + r) * p.N + n];
    s.maximum[r] = lse * kLog2E;
    if (lse == -kInfinity) {  // without a key the old result may be anything
      for (int c = 0; c < p.Dv; c++) s.out[c * kLanes + r] = 0.0f;
      continue;
    }
    s.sum[r] = 1.0f;
    if (!p.max_logits || strip.limit[r] == 0) continue;
    s.maximum[r] = p.max_logits[(first + r) * p.N + n] * kLog2E;
    s.sum[r] = std::exp2(lse * kLog2E - s.maximum[r]);
    for (int c = 0; c < p.Dv; c++) s.out[c * kLanes + r] *= s.sum[r];
  }
}

void store_strip(const Kernels& k, const MlaPrefillParams<float>& p, int64_t first, int count, int n,
                 const Strip& strip) {
  const State& s = strip.state;
  const int64_t stride = int64_t(p.N) * p.Dv;
  s.store(k, p.Dv, count, p.out + first * stride + n * p.Dv, stride);
  for (int r = 0; r < count; r++) {
    // where nothing was added, and where the maximum stays, the way to base 2 and back may round
    if (strip.limit[r] == 0 && p.continue_state) continue;
    const int64_t at = (first + r) * p.N + n;
    p.lse[at] = log_sum_exp(s.maximum[r], s.sum[r]);
    if (!p.max_logits) continue;
    if (std::isnan(s.sum[r]))
      p.max_logits[at] = s.sum[r];
    else if (!p.continue_state || s.maximum[r] > p.max_logits[at] * kLog2E)
      p.max_logits[at] = s.maximum[r] * kLn2;
  }
}

// Head n, queries [begin, begin + count) of sequence b.
void attend_block(const Kernels& k, const MlaPrefillParams<float>& p, int b, int n, int begin, int count) {
  alignas(64) float scratch[kScratch];
  Strip strips[kMaxStrips];
  const int key_dim = p.Dn + p.R, n_strips = (count + kLanes - 1) / kLanes;
  const int64_t key_start = p.cu_seqlens_k[b], key_count = p.cu_seqlens_k[b + 1] - key_start;
  const int64_t first = p.cu_seqlens_q[b] + begin;
  for (int i = 0; i < n_strips; i++) {
    Strip& s = strips[i];
    float* q = scratch + i * (key_dim * kLanes + State::size(p.Dv));
    s.q = q;
    s.state = State(q + key_dim * kLanes, p.Dv);
    for (int r = 0; r < kLanes; r++) {
      const int query = i * kLanes + r;
      s.limit[r] =
          query < count ? std::clamp<int64_t>(int64_t(begin) + query + p.causal_offsets[b] + 1, 0, key_count) : 0;
    }
    load_strip(k, p, first + i * kLanes, std::min(kLanes, count - i * kLanes), n, q, s);
  }
  const int64_t seen = strips[n_strips - 1].limit[(count - 1) % kLanes];
  const float* kv = p.kv + key_start * p.kv_stride_s + n * p.kv_stride_n;
  const float* k_pe = p.k_pe + key_start * p.k_pe_stride;
  // A row of the panel: k_nope, k_pe, value.
  attend(k, strips, n_strips, {key_dim + p.Dv, key_dim, key_dim, p.Dv}, p.scale, seen, [&](int64_t j, float* out) {
    const float* row = kv + j * p.kv_stride_s;
    out = std::copy_n(row, p.Dn, out);
    out = std::copy_n(k_pe + j * p.k_pe_stride, p.R, out);
    std::copy_n(row + p.Dn, p.Dv, out);
  });
  for (int i = 0; i < n_strips; i++)
    store_strip(k, p, first + i * kLanes, std::min(kLanes, count - i * kLanes), n, strips[i]);
}

}  // namespace

void mla_prefill(const MlaPrefillParams<float>& p) {
  const Kernels& k = kernels();
  const int block = strips_in_scratch(p.Dn + p.R + p.Dv + 2) * kLanes;
  for (int b = 0; b < p.B; b++) {
    const int queries = p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b];
    const int64_t blocks = (queries + block - 1) / block;
    parallel_for(p.N * blocks, 1, [&](int64_t item, int64_t) {
      // The blocks of one head follow each other: its keys and values stay in the cache.
      const int n = int(item / blocks), begin = int(item % blocks) * block;
      attend_block(k, p, b, n, begin, std::min(block, queries - begin));
    });
  }
}

}  // namespace kimi::cpu
