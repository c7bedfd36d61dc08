// What kernels share: warp and block reductions, packed bf16, vectors of 16 bytes.
#pragma once

#include "cuda/ptx.cuh"

namespace kimi::cuda {

constexpr int kWarp = 32;

constexpr int ceil_div(int64_t a, int b) { return int((a + b - 1) / b); }

struct Add {
  template <class T>
  PTX_FN T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  PTX_FN T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// Every lane of the warp gets f over all lanes; always in the same order.
template <class T, class F>
PTX_FN T warp_reduce(T v, F f) {
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2) v = f(v, __shfl_xor_sync(~0u, v, d));
  return v;
}

// Every thread of the block gets f over all threads. `part` may be used again at once.
template <int Threads, class T, class F>
PTX_FN T block_reduce(T v, T identity, T (&part)[Threads / kWarp], F f) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  v = warp_reduce(v, f);
  if (lane == 0) part[warp] = v;
  __syncthreads();
  v = warp_reduce(lane < Threads / kWarp ? part[lane] : identity, f);
  __syncthreads();
  return v;
}

// Eight bf16 as they lie in 16 bytes, as float32.
PTX_FN void unpack8(const uint4& v, float (&out)[8]) {
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) out[2 * i] = ptx::low_bf16(words[i]), out[2 * i + 1] = ptx::high_bf16(words[i]);
}

PTX_FN uint4 pack8(const float (&v)[8]) {
  return {ptx::pack_bf16(v[0], v[1]), ptx::pack_bf16(v[2], v[3]), ptx::pack_bf16(v[4], v[5]),
          ptx::pack_bf16(v[6], v[7])};
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace kimi::cuda
