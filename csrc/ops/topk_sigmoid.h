// Router: the K experts with the largest sigmoid(logit) + bias; the bias chooses and never weighs.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace kimi {

struct TopkSigmoidParams {
  const float* logits;  // [T, E]
  int64_t logits_stride;
  const float* bias;  // [E]
  float* weights;     // [T, K]: sigmoid(logit), divided by their sum if normalised, times the factor
  int32_t* ids;       // [T, K]: descending choice, ties to the lower index, NaN below everything
  float* workspace;   // [T, E] scores
  int T, E, K;
  float routed_scaling_factor;
  bool norm_topk_prob;
};

namespace cpu {
void topk_sigmoid(const TopkSigmoidParams& p);
}  // namespace cpu
namespace cuda {
void topk_sigmoid(const TopkSigmoidParams& p, Stream stream);
}  // namespace cuda

}  // namespace kimi
