#include "ops/top_k_top_p_sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/parallel.h"

namespace kimi::cpu {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// The first largest logit, or -1 if none is finite. +inf counts as an error too: softmax could not weigh it.
int argmax(const float* logits, int V) {
  int best = -1;
  for (int i = 0; i < V; i++)
    if (logits[i] > (best < 0 ? kLowest : logits[best])) best = i;
  return best >= 0 && std::isfinite(logits[best]) ? best : -1;
}

// probabilities = exp((logits - maximum) / temperature), not normalised; returns their sum.
double weigh(const float* logits, int V, float maximum, float temperature, float* probabilities) {
  double sum = 0;
  for (int i = 0; i < V; i++) {
    const float e = std::isnan(logits[i]) ? 0.0f : std::exp((logits[i] - maximum) / temperature);
    sum += probabilities[i] = e;
  }
  return sum;
}

// Sorts the most likely tokens to the front of `order`, as many as top-k and top-p can keep, and returns how many these
// are. Ranks by probability, ties to the lower index. The front doubles until it holds enough.
int keep_top(const float* probabilities, int V, int top_k, float top_p, double total, int32_t* order) {
  auto ranks_above = [=](int32_t a, int32_t b) {
    return probabilities[a] != probabilities[b] ? probabilities[a] > probabilities[b] : a < b;
  };
  std::iota(order, order + V, 0);
  const int k = top_k > 0 ? std::min(top_k, V) : V;
  int sorted = 0;
  double sum = 0;
  for (int front = std::min(k, 256);; front = int(std::min<int64_t>(k, 4 * int64_t(front)))) {
    if (front == V)
      std::sort(order + sorted, order + V, ranks_above);
    else
      std::partial_sort(order + sorted, order + front, order + V, ranks_above);
    for (; sorted < front; sorted++) sum += probabilities[order[sorted]];
    if (front == k) total = sum;  // top-p applies to what top-k leaves
    if (front == k || (top_k == 0 && sum >= top_p * total)) break;
  }
  double head = 0;
  for (int i = 0; i < sorted; i++)
    if ((head += probabilities[order[i]]) >= top_p * total) return i + 1;
  return sorted;
}

int32_t draw(const float* probabilities, const int32_t* order, int count, float uniform) {
  double total = 0, sum = 0;
  for (int i = 0; i < count; i++) total += probabilities[order[i]];
  for (int i = 0; i < count; i++)
    if ((sum += probabilities[order[i]]) > uniform * total) return order[i];
  return order[count - 1];
}

int32_t sample(const TopKTopPSampleParams& p, int64_t b) {
  const float* logits = p.logits + b * p.logits_stride;
  const int best = argmax(logits, p.V);
  if (best < 0 || p.temperature[b] == 0.0f) return best;
  float* probabilities = p.probabilities + b * p.V;
  int32_t* order = p.order + b * p.V;
  const double total = weigh(logits, p.V, logits[best], p.temperature[b], probabilities);
  int count = keep_top(probabilities, p.V, p.top_k[b], p.top_p[b], total, order);
  const float threshold = p.min_p[b] * probabilities[order[0]];
  while (count > 1 && probabilities[order[count - 1]] < threshold) count--;
  return draw(probabilities, order, count, p.uniform[b]);
}

}  // namespace

void top_k_top_p_sample(const TopKTopPSampleParams& p) {
  parallel_for(p.B, 1, [&](int64_t b, int64_t) { p.ids[b] = sample(p, b); });
}

}  // namespace kimi::cpu
