#include "ops/mla_prefill.h"

#include "core/parallel.h"
#include "cpu/attend.h"

namespace kimi::cpu {
namespace {

// Columns [column, column + n) of the concatenation of a (of length split) and b.
void copy_joined(const float* a, int split, const float* b, int column, int n, float* out) {
  for (; n > 0 && column < split; n--) *out++ = a[column++];
  std::copy_n(b + (column - split), n, out);
}

// The running state of a query whose result over other keys is (out, lse): maximum = lse, sum = 1.
void start_state(const MlaPrefillParams& p, int64_t row, int i, AttentionState& s) {
  s.out[i] = p.out + row * p.Dv;
  const float lse = p.continue_state ? p.lse[row] : -std::numeric_limits<float>::infinity();
  s.maximum[i] = lse;
  s.sum[i] = lse == -std::numeric_limits<float>::infinity() ? 0.0f : 1.0f;
  if (s.sum[i] == 0.0f) std::fill_n(s.out[i], p.Dv, 0.0f);
}

// Head n, queries [begin, begin + count) of sequence b.
void attend_block(const Kernels& k, const MlaPrefillParams& p, int b, int n, int begin, int count) {
  const int key_start = p.cu_seqlens_k[b], key_count = p.cu_seqlens_k[b + 1] - key_start;
  AttentionState s;
  const float* q[kMaxQueries] = {};
  int64_t limit[kMaxQueries] = {};
  for (int i = 0; i < count; i++) {
    const int64_t t = p.cu_seqlens_q[b] + begin + i;
    q[i] = p.q + t * p.q_stride_t + n * p.q_stride_n;
    limit[i] = std::clamp<int64_t>(int64_t(begin) + i + p.causal_offsets[b] + 1, 0, key_count);
    start_state(p, t * p.N + n, i, s);
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
  for (int i = 0; i < count; i++) {
    if (s.sum[i] != 0.0f) k.scale(s.out[i], 1.0f / s.sum[i], p.Dv);
    p.lse[(p.cu_seqlens_q[b] + begin + i) * int64_t(p.N) + n] = log_sum_exp(s.maximum[i], s.sum[i]);
  }
}

}  // namespace

void mla_prefill(const MlaPrefillParams& p) {
  const Kernels& k = kernels();
  for (int b = 0; b < p.B; b++) {
    const int queries = p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b];
    const int64_t blocks = (queries + kMaxQueries - 1) / kMaxQueries;
    parallel_for(p.N * blocks, 1, [&](int64_t item, int64_t) {
      // The last block sees the most keys: it goes first, so that no thread ends with a long piece.
      const int begin = int(blocks - 1 - item / p.N) * kMaxQueries;
      attend_block(k, p, b, int(item % p.N), begin, std::min(kMaxQueries, queries - begin));
    });
  }
}

}  // namespace kimi::cpu
