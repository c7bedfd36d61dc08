// Stable counting sort of (token, slot) pairs by expert.
#pragma once
#include <algorithm>
#include <cstdint>

namespace kimi::cpu {

// ids [M] in [-1, E) -> offsets [E + 1], inverse [M]: the sorted row of each pair, -1 where the id is -1.
inline void sort_by_expert(const int32_t* ids, int M, int E, int32_t* offsets, int32_t* inverse) {
  std::fill(offsets, offsets + E + 1, 0);
  for (int i = 0; i < M; i++)
    if (ids[i] >= 0) offsets[ids[i] + 1]++;
  for (int e = 0; e < E; e++) offsets[e + 1] += offsets[e];
  // offsets[e] serves as the cursor of expert e; afterwards it is the start of e + 1, and one shift restores it.
  for (int i = 0; i < M; i++) inverse[i] = ids[i] < 0 ? -1 : offsets[ids[i]]++;
  for (int e = E; e > 0; e--) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
}

}  // namespace kimi::cpu
