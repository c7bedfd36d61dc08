// Stable counting sort of (token, slot) pairs by expert: one launch, no scratch.
#pragma once

#include "cuda/device.cuh"

namespace kimi::cuda {

constexpr int kMaxExperts = 1024;  // more: gpu::Error

// ids [pairs] -> offsets [E + 1]: the rows of expert e are offsets[e] .. offsets[e + 1];
// pair_of_row [pairs] or null: which pair a row is, written up to offsets[E];
// row_of_pair [pairs]: the row of a pair, -1 if its id lies outside [0, E).
void sort_by_expert(const int32_t* ids, int pairs, int E, int32_t* offsets, int32_t* pair_of_row, int32_t* row_of_pair,
                    Stream stream);

}  // namespace kimi::cuda
