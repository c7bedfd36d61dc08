// What rope and append_mla_cache share: N adjacent elements of a row in float32, and their rotation. Eight elements are
// 16 bytes, at an address that allows it.
#pragma once

#include "cuda/device.cuh"

namespace kimi::cuda {

template <int N>
PTX_FN void load(const bf16* from, float (&v)[N]) {
  if constexpr (N == 8)
    unpack8(*reinterpret_cast<const uint4*>(from), v);
  else
    for (int i = 0; i < N; ++i) v[i] = to_float(from[i]);
}

template <int N>
PTX_FN void store(bf16* to, const float (&v)[N]) {
  if constexpr (N == 8)
    *reinterpret_cast<uint4*>(to) = pack8(v);
  else
    for (int i = 0; i < N; ++i) to[i] = to_bf16(v[i]);
}

// Rotates the pairs (v[2 i], v[2 i + 1]) by cos[i] and sin[i].
template <int N>
PTX_FN void rotate(float (&v)[N], const float* cos, const float* sin) {
  float c[N / 2], s[N / 2];
  if constexpr (N == 8) {
    const float4 c4 = *reinterpret_cast<const float4*>(cos), s4 = *reinterpret_cast<const float4*>(sin);
    c[0] = c4.x, c[1] = c4.y, c[2] = c4.z, c[3] = c4.w;
    s[0] = s4.x, s[1] = s4.y, s[2] = s4.z, s[3] = s4.w;
  } else {
    for (int i = 0; i < N / 2; ++i) c[i] = cos[i], s[i] = sin[i];
  }
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float a = v[2 * i], b = v[2 * i + 1];
    v[2 * i] = a * c[i] - b * s[i], v[2 * i + 1] = a * s[i] + b * c[i];
  }
}

// The same by row `position` of tables [P, R / 2], from pair `pair` on; NaN if there is no such row.
template <int N>
PTX_FN void rotate_at(float (&v)[N], const float* cos, const float* sin, int64_t position, int P, int R, int pair) {
  if (position >= 0 && position < P) {
    const int64_t row = position * (R / 2) + pair;
    rotate(v, cos + row, sin + row);
  } else {
    for (float& x : v) x = NAN;
  }
}

}  // namespace kimi::cuda
