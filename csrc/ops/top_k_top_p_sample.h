// One token per row of logits: temperature, then top-k, top-p and min-p, then the inverse of the cumulative
// distribution.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace kimi {

struct TopKTopPSampleParams {
  const float* logits;  // [B, V]; NaN counts as -inf
  int64_t logits_stride;
  const float* uniform;      // [B], in [0, 1)
  const float* temperature;  // [B]; 0 takes the largest logit
  const int32_t* top_k;      // [B]; 0 keeps all
  const float* top_p;        // [B]; 1 keeps all
  const float* min_p;        // [B]; 0 keeps all
  int32_t* ids;              // [B]; -1 if the largest logit is not finite or a setting is none of these
  float* probabilities;      // [B, V], scratch of the CPU
  int32_t* order;            // [B, V], scratch
  int B, V;
};

namespace cpu {
void top_k_top_p_sample(const TopKTopPSampleParams& p);
}  // namespace cpu
namespace cuda {
void top_k_top_p_sample(const TopKTopPSampleParams& p, Stream stream);
}  // namespace cuda

}  // namespace kimi
