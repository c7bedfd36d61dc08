#include "ops/mla_decode.h"

#include "core/parallel.h"
#include "cpu/attend.h"

namespace kimi {
namespace {

constexpr int64_t kMinSplit = 256, kMaxSplits = 64;

int64_t rows(const MlaDecodeParams<float>& p) { return int64_t(p.B) * p.Q; }

// A sequence is cut into runs of keys that are attended apart and merged afterwards: many for one sequence, few for
// many of them. Depends on the call's shapes alone, never on the number of threads.
int64_t split_length(const MlaDecodeParams<float>& p) {
  const int64_t splits = std::max<int64_t>(1, kMaxSplits / std::max<int64_t>(1, rows(p)));
  return std::max(kMinSplit, (p.max_seq_len + splits - 1) / splits);
}

int64_t split_count(const MlaDecodeParams<float>& p) { return (p.max_seq_len + split_length(p) - 1) / split_length(p); }

}  // namespace

namespace cpu {

// Per query, split and head: the weighted sum [C], its maximum and its sum.
size_t mla_decode_workspace(const MlaDecodeParams<float>& p) {
  return size_t(rows(p) * split_count(p) * p.N * (p.C + 2));
}

namespace {

struct Split {
  float* out;      // [N, C]
  float* maximum;  // [N]
  float* sum;      // [N]

  Split(const MlaDecodeParams<float>& p, int64_t row, int64_t index) {
    out = p.workspace + (row * split_count(p) + index) * p.N * (p.C + 2);
    maximum = out + int64_t(p.N) * p.C;
    sum = maximum + p.N;
  }
};

void load_row(const Kernels&, const float* row, int n, float* out) { std::copy_n(row, n, out); }
void load_row(const Kernels& k, const bf16* row, int n, float* out) { k.widen(row, out, n); }

// Heads [head, head + count) of query `row` (sequence row / Q) over one split of its keys.
template <class Element>
void attend_split(const Kernels& k, const MlaDecodeParams<float>& p, int64_t row, int64_t index, int head, int count) {
  const int64_t b = row / p.Q, visible = p.seq_lens[b] - (p.Q - 1 - row % p.Q);
  const int64_t begin = index * split_length(p), end = std::min(visible, begin + split_length(p));
  const int64_t keys = std::max<int64_t>(0, end - begin), width = p.C + p.R;
  const int32_t* pages = p.page_table + b * p.max_pages;
  const auto* cache = static_cast<const Element*>(p.cache);
  const Split split(p, row, index);
  AttentionState s;
  const float* q[kMaxQueries] = {};
  int64_t limit[kMaxQueries] = {};
  for (int i = 0; i < count; i++) {
    q[i] = p.q + (row * p.N + head + i) * width;
    limit[i] = keys;
    s.out[i] = split.out + int64_t(head + i) * p.C;
    s.maximum[i] = -std::numeric_limits<float>::infinity();
    s.sum[i] = 0;
    std::fill_n(s.out[i], p.C, 0.0f);
  }
  auto load = [&](int64_t j, int column, int columns, float* out) {
    const int64_t position = begin + j;
    const int64_t slot = int64_t(pages[position / p.page_size]) * p.page_size + position % p.page_size;
    load_row(k, cache + slot * width + column, columns, out);
  };
  attend(k, q, count, limit, int(width), p.C, p.scale, keys, load, load, s);
  std::copy_n(s.maximum, count, split.maximum + head);
  std::copy_n(s.sum, count, split.sum + head);
}

// out = sum_i exp(m_i - m) out_i / sum_i exp(m_i - m) sum_i over the splits of head n.
void combine(const Kernels& k, const MlaDecodeParams<float>& p, int64_t row, int n) {
  const int64_t splits = split_count(p);
  float maximum = -std::numeric_limits<float>::infinity(), sum = 0;
  for (int64_t i = 0; i < splits; i++) maximum = std::max(maximum, Split(p, row, i).maximum[n]);
  float* out = p.out + (row * p.N + n) * p.C;
  std::fill_n(out, p.C, 0.0f);
  for (int64_t i = 0; i < splits; i++) {
    const Split split(p, row, i);
    if (split.sum[n] == 0.0f) continue;
    const float weight = std::exp(split.maximum[n] - maximum);
    const float* weights = &weight;
    sum += weight * split.sum[n];
    k.add_weighted_rows(&weights, 1, split.out + int64_t(n) * p.C, 0, 1, &out, p.C);
  }
  if (sum != 0.0f) k.scale(out, 1.0f / sum, p.C);
  p.lse[row * p.N + n] = log_sum_exp(maximum, sum);
}

}  // namespace

void mla_decode(const MlaDecodeParams<float>& p) {
  const Kernels& k = kernels();
  constexpr int kHeads = 16;
  const int64_t splits = split_count(p), groups = (p.N + kHeads - 1) / kHeads;
  parallel_for(rows(p) * splits * groups, 1, [&](int64_t item, int64_t) {
    const int head = int(item % groups) * kHeads;
    const int64_t row = item / (splits * groups), index = item / groups % splits;
    const auto attend_heads = p.cache_dtype == DType::F32 ? attend_split<float> : attend_split<bf16>;
    attend_heads(k, p, row, index, head, std::min(kHeads, p.N - head));
  });
  parallel_for(rows(p) * p.N, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) combine(k, p, i / p.N, int(i % p.N));
  });
}

}  // namespace cpu
}  // namespace kimi
