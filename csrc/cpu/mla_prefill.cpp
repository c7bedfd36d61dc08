#include "ops/mla_prefill.h"

#include "core/parallel.h"
#include "cpu/attend.h"

namespace kimi::cpu {
namespace {

// Columns [column, column + n) of the concatenation of a (of length split) and b.
void copy_joined(const float* a, int split, const float* b, int column, int n, float* out) {
  const int from_a = std::clamp(split - column, 0, n);
  std::copy_n(a + column, from_a, out);
  std::copy_n(b + std::max(0, column + from_a - split), n - from_a, out + from_a);
}

// The queries of one head and their results lie a row of all heads apart, at a power of two that maps them to the same
// cache sets. Rows of at most kColumns are worked on side by side instead.
struct QueryRows {
  alignas(64) float q[kMaxQueries * kColumns];
  alignas(64) float out[kMaxQueries * kColumns];
};

// The running state of a query whose result over other keys is (out, lse): maximum = lse, sum = 1.
void start_state(const MlaPrefillParams<float>& p, int64_t row, int i, AttentionState& s) {
  const float lse = p.continue_state ? p.lse[row] : -std::numeric_limits<float>::infinity();
  s.maximum[i] = lse;
  s.sum[i] = lse == -std::numeric_limits<float>::infinity() ? 0.0f : 1.0f;
  if (s.sum[i] == 0.0f)
    std::fill_n(s.out[i], p.Dv, 0.0f);
  else if (s.out[i] != p.out + row * p.Dv)
    std::copy_n(p.out + row * p.Dv, p.Dv, s.out[i]);
}

void finish_state(const Kernels& k, const MlaPrefillParams<float>& p, int64_t row, int i, const AttentionState& s) {
  if (s.sum[i] != 0.0f) k.scale(s.out[i], 1.0f / s.sum[i], p.Dv);
  if (s.out[i] != p.out + row * p.Dv) std::copy_n(s.out[i], p.Dv, p.out + row * p.Dv);
  p.lse[row] = log_sum_exp(s.maximum[i], s.sum[i]);
}

// Head n, queries [begin, begin + count) of sequence b.
void attend_block(const Kernels& k, const MlaPrefillParams<float>& p, int b, int n, int begin, int count) {
  const int key_start = p.cu_seqlens_k[b], key_count = p.cu_seqlens_k[b + 1] - key_start;
  const int64_t first = p.cu_seqlens_q[b] + begin;
  const bool side_by_side = std::max(p.Dn + p.R, p.Dv) <= kColumns;
  QueryRows rows;
  AttentionState s;
  const float* q[kMaxQueries] = {};
  int64_t limit[kMaxQueries] = {};
  for (int i = 0; i < count; i++) {
    q[i] = p.q + (first + i) * p.q_stride_t + n * p.q_stride_n;
    s.out[i] = p.out + ((first + i) * p.N + n) * p.Dv;
    if (side_by_side) {
      q[i] = std::copy_n(q[i], p.Dn + p.R, rows.q + i * kColumns) - (p.Dn + p.R);
      s.out[i] = rows.out + i * kColumns;
    }
    limit[i] = std::clamp<int64_t>(int64_t(begin) + i + p.causal_offsets[b] + 1, 0, key_count);
    start_state(p, (first + i) * p.N + n, i, s);
  }
  const float* kv = p.kv + key_start * p.kv_stride_s + n * p.kv_stride_n;
  const float* k_pe = p.k_pe + key_start * p.k_pe_stride;
  auto load_key = [&](int64_t j, int column, int columns, float* out) {
    copy_joined(kv + j * p.kv_stride_s, p.Dn, k_pe + j * p.k_pe_stride, column, columns, out);
  };
  auto load_value = [&](int64_t j, int column, int columns, float* out) {
    std::copy_n(kv + j * p.kv_stride_s + p.Dn + column, columns, out);
  };
  attend(k, q, count, limit, p.Dn + p.R, p.Dv, p.scale, limit[count - 1], load_key, load_value, s);
  for (int i = 0; i < count; i++) finish_state(k, p, (first + i) * p.N + n, i, s);
}

}  // namespace

void mla_prefill(const MlaPrefillParams<float>& p) {
  const Kernels& k = kernels();
  for (int b = 0; b < p.B; b++) {
    const int queries = p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b];
    const int64_t blocks = (queries + kMaxQueries - 1) / kMaxQueries;
    parallel_for(p.N * blocks, 1, [&](int64_t item, int64_t) {
      // The blocks of one head follow each other: its keys and values stay in the cache.
      const int n = int(item / blocks), begin = int(item % blocks) * kMaxQueries;
      attend_block(k, p, b, n, begin, std::min(kMaxQueries, queries - begin));
    });
  }
}

}  // namespace kimi::cpu
