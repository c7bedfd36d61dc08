// Softmax attention of a block of queries over one run of keys, key block by key block with a running maximum and sum
// (online softmax). attention, mla_prefill and mla_decode differ in where rows come from.
//
// Queries stand side by side, kLanes of them a strip. A block of rows is brought to float32 in a panel once and serves
// all strips, their scores (keys . q) and their values (weights . values).
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/kernels.h"

namespace kimi::cpu {

constexpr int kMaxStrips = 16, kMaxKeys = 96;
constexpr int kPanel = 48 * 576;            // floats: 48 rows of the model's cache
constexpr int kScratch = 8 * kLanes * 324;  // floats: what the strips of a block need. Both stay in L2
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// A softmax in progress. Maxima are to base 2.
struct State {
  float* out;      // [value_dim][kLanes]: weighted sum of values, not yet divided by `sum`
  float* maximum;  // [kLanes] of the scores so far, -inf before the first
  float* sum;      // [kLanes] of 2^(score - maximum)

  State() = default;
  State(float* at, int value_dim) : out(at), maximum(out + value_dim * kLanes), sum(maximum + kLanes) {}
  static int64_t size(int value_dim) { return (value_dim + 2) * kLanes; }

  void clear(int value_dim) const {
    std::fill_n(out, value_dim * kLanes, 0.0f);
    std::fill_n(maximum, kLanes, -kInfinity);
    std::fill_n(sum, kLanes, 0.0f);
  }

  // Ends the softmax: divides by the sums, and writes the first `count` queries as rows.
  void store(const Kernels& k, int value_dim, int count, float* rows, int64_t stride) const {
    float factor[kLanes];
    for (int r = 0; r < kLanes; r++) factor[r] = sum[r] == 0.0f ? 1.0f : 1.0f / sum[r];
    for (int c = 0; c < value_dim; c++)
      for (int r = 0; r < kLanes; r++) out[c * kLanes + r] *= factor[r];
    k.attention->transpose(out, kLanes, value_dim, count, rows, stride);
  }
};

struct Strip {
  const float* q;  // [key_dim][kLanes], finite in lanes without a query
  State state;
  int64_t limit[kLanes];  // the query sees the keys below it
};

// A row of the panel: the key is [0, key_dim), the value [value_at, value_at + value_dim).
struct Row {
  int width, key_dim, value_at, value_dim;
};

// Natural logarithm of the sum of exp(score), -inf without a key.
inline float log_sum_exp(float maximum, float sum) {
  return sum == 0.0f ? -kInfinity : (maximum + std::log2(sum)) * kLn2;
}

// Strips of a block when a query needs so many floats of scratch.
inline int strips_in_scratch(int floats) { return std::min(kMaxStrips, kScratch / (kLanes * floats)); }

// A block of rows as float32, and the products of strips with them. load(j, row) brings key j into a row.
template <class Load>
struct FloatPanel {
  const Kernels& k;
  const Strip* strips;
  Row row;
  float scale;
  const Load& load;
  float* rows;  // [kPanel]

  int block() const { return std::min(kMaxKeys, kPanel / row.width); }

  void fill(int64_t begin, int keys) {
    for (int j = 0; j < keys; j++) load(begin + j, rows + j * row.width);
  }
  void scores(int strip, int keys, float* out) const {
    k.attention->scores(strips[strip].q, rows, row.width, keys, row.key_dim, scale * kLog2E, out);
  }
  void add_values(const float* weights, int keys, const float* factor, float* out) const {
    k.attention->add_values(weights, rows + row.value_at, row.width, keys, row.value_dim, factor, out);
  }
};

// Adds keys [0, n_keys) to the strips.
template <class Panel>
void attend(const Kernels& k, const Strip* strips, int n_strips, int64_t n_keys, Panel& panel) {
  alignas(64) float scores[kMaxKeys * kLanes];
  const int block = panel.block();
  for (int64_t j0 = 0; j0 < n_keys; j0 += block) {
    const int keys = int(std::min<int64_t>(block, n_keys - j0));
    panel.fill(j0, keys);
    for (int i = 0; i < n_strips; i++) {
      const Strip& s = strips[i];
      const int seen = int(std::clamp<int64_t>(*std::max_element(s.limit, s.limit + kLanes) - j0, 0, keys));
      if (seen == 0) continue;
      panel.scores(i, seen, scores);
      for (int r = 0; r < kLanes; r++)
        for (int64_t j = std::max<int64_t>(0, s.limit[r] - j0); j < seen; j++) scores[j * kLanes + r] = -kInfinity;
      float factor[kLanes];
      k.attention->soften(scores, seen, s.state.maximum, s.state.sum, factor);
      panel.add_values(scores, seen, factor, s.state.out);
    }
  }
}

template <class Load>
void attend(const Kernels& k, const Strip* strips, int n_strips, const Row& row, float scale, int64_t n_keys,
            const Load& load) {
  alignas(64) float rows[kPanel];
  FloatPanel<Load> panel{k, strips, row, scale, load, rows};
  attend(k, strips, n_strips, n_keys, panel);
}

}  // namespace kimi::cpu
