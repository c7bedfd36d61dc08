#include "ops/topk_sigmoid.h"

#include <cmath>

#include "core/parallel.h"

namespace kimi::cpu {
namespace {

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// Whether choice a ranks strictly above choice b. NaN ranks below everything.
bool above(float a, float b) { return a > b || (!std::isnan(a) && std::isnan(b)); }

// Keeps the K best experts seen so far in order; a newcomer goes behind its equals, so ties go to the lower index.
void choose(const float* scores, const float* bias, int E, int K, int32_t* ids) {
  auto choice = [&](int e) { return scores[e] + bias[e]; };
  for (int e = 0; e < E; e++) {
    int slot = std::min(e, K);
    while (slot > 0 && above(choice(e), choice(ids[slot - 1]))) {
      if (slot < K) ids[slot] = ids[slot - 1];
      slot--;
    }
    if (slot < K) ids[slot] = e;
  }
}

}  // namespace

void topk_sigmoid(const TopkSigmoidParams& p) {
  parallel_for(p.T, 8, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      float* scores = p.workspace + t * p.E;
      int32_t* ids = p.ids + t * p.K;
      float* weights = p.weights + t * p.K;
      for (int e = 0; e < p.E; e++) scores[e] = sigmoid(p.logits[t * p.logits_stride + e]);
      choose(scores, p.bias, p.E, p.K, ids);
      float sum = 0;
      for (int i = 0; i < p.K; i++) sum += weights[i] = scores[ids[i]];
      const float factor = p.routed_scaling_factor / (p.norm_topk_prob ? sum + 1e-20f : 1.0f);
      for (int i = 0; i < p.K; i++) weights[i] *= factor;
    }
  });
}

}  // namespace kimi::cpu
