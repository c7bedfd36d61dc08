// One projection of all experts, each where it lies: on disk every expert is a tensor of its own.
#pragma once
#include "core/dtype.h"

namespace kimi {

struct ExpertWeights {
  const void* const* weight;  // [E] -> bf16 [out, in], or packed INT4 int32 [out, in / 8]
  const bf16* const* scale;   // [E] -> [out, in / 32]; null when the weights are bf16
  int E, n_out, n_in;
};

}  // namespace kimi
