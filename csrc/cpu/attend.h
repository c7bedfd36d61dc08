// Softmax attention of a block of queries over one run of keys, computed key block by key block with a running maximum
// and sum (online softmax). mla_prefill and mla_decode differ in where rows come from.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/kernels.h"

namespace kimi::cpu {

constexpr int kMaxQueries = 36, kKeys = 32, kColumns = 256;  // a panel of kKeys x kColumns floats is 32 KiB

struct AttentionState {
  float* out[kMaxQueries];     // [value_dim] each: weighted sum of values, not yet divided by `sum`
  float maximum[kMaxQueries];  // of the scores so far, -inf before the first
  float sum[kMaxQueries];      // of exp(score - maximum)
};

inline float log_sum_exp(float maximum, float sum) {
  return sum > 0 || std::isnan(sum) ? maximum + std::log(sum) : -std::numeric_limits<float>::infinity();
}

// scores[i][j] = scale * q[i] . key[j0 + j]
template <class LoadKey>
void score_block(const Kernels& k, const float* const* q, int queries, int key_dim, float scale, int64_t j0, int keys,
                 const LoadKey& load_key, float* panel, float* scores) {
  float tile[kTileT * kTileRows];
  std::fill(scores, scores + queries * kKeys, 0.0f);
  for (int c = 0; c < key_dim; c += kColumns) {
    const int columns = std::min(kColumns, key_dim - c);
    for (int j = 0; j < keys; j++) load_key(j0 + j, c, columns, panel + j * kColumns);
    for (int i = 0; i < queries; i += kTileT) {
      const int nq = std::min(kTileT, queries - i);
      const float* qs[kTileT];
      for (int a = 0; a < nq; a++) qs[a] = q[i + a] + c;
      for (int j = 0; j < keys; j += kTileRows) {
        const int nk = std::min(kTileRows, keys - j);
        k.dot_f32(qs, nq, panel + j * kColumns, kColumns, nk, columns, tile);
        for (int a = 0; a < nq; a++)
          for (int b = 0; b < nk; b++) scores[(i + a) * kKeys + j + b] += scale * tile[a * kTileRows + b];
      }
    }
  }
}

// Turns one query's scores over `visible` of `keys` keys into weights and moves its state to the new maximum.
inline void soften(const Kernels& k, float* scores, int visible, int keys, int value_dim, int i, AttentionState& s) {
  std::fill(scores + visible, scores + keys, 0.0f);
  if (visible == 0) return;
  const float maximum = std::max(k.maximum(scores, visible), s.maximum[i]);
  if (maximum == -std::numeric_limits<float>::infinity()) {  // -inf - -inf would be NaN: such keys weigh nothing
    for (int j = 0; j < visible; j++) scores[j] = std::isnan(scores[j]) ? scores[j] : 0.0f;
    return;
  }
  if (maximum > s.maximum[i]) {
    const float shrink = std::exp(s.maximum[i] - maximum);
    k.scale(s.out[i], shrink, value_dim);
    s.sum[i] *= shrink;
    s.maximum[i] = maximum;
  }
  s.sum[i] += k.exp_sum(scores, maximum, visible);
}

// Adds keys [0, n_keys) to the state. Query i sees the keys below limit[i].
// load_key(j, column, n, out) and load_value(j, column, n, out) give part of a row as float32.
template <class LoadKey, class LoadValue>
void attend(const Kernels& k, const float* const* q, int queries, const int64_t* limit, int key_dim, int value_dim,
            float scale, int64_t n_keys, const LoadKey& load_key, const LoadValue& load_value, AttentionState& s) {
  alignas(64) float panel[kKeys * kColumns];
  float scores[kMaxQueries * kKeys];
  for (int64_t j0 = 0; j0 < n_keys; j0 += kKeys) {
    const int keys = int(std::min<int64_t>(kKeys, n_keys - j0));
    score_block(k, q, queries, key_dim, scale, j0, keys, load_key, panel, scores);
    for (int i = 0; i < queries; i++)
      soften(k, scores + i * kKeys, int(std::clamp<int64_t>(limit[i] - j0, 0, keys)), keys, value_dim, i, s);
    for (int c = 0; c < value_dim; c += kColumns) {
      const int columns = std::min(kColumns, value_dim - c);
      for (int j = 0; j < keys; j++) load_value(j0 + j, c, columns, panel + j * kColumns);
      for (int i = 0; i < queries; i += kTileT) {
        const int nq = std::min(kTileT, queries - i);
        const float* weights[kTileT];
        float* outs[kTileT];
        for (int a = 0; a < nq; a++) weights[a] = scores + (i + a) * kKeys, outs[a] = s.out[i + a] + c;
        k.add_weighted_rows(weights, nq, panel, kColumns, keys, outs, columns);
      }
    }
  }
}

}  // namespace kimi::cpu
