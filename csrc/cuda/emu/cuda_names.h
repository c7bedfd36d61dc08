// CUDA's names for kernels on the host: built-in variables, barriers, shuffles, atomics, intrinsics.
#pragma once

#include <cmath>

#include "cuda/emu/emu.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __grid_constant__
#define __shared__ static_assert(false, "declare shared memory with GPU_SHARED or GPU_SHARED_DYNAMIC")
#define __launch_bounds__(...)
#define threadIdx (::kimi::emu::g.cur->tid)
#define blockIdx (::kimi::emu::g.index)
#define blockDim (::kimi::emu::g.block)
#define gridDim (::kimi::emu::g.grid)

namespace kimi {

using std::max;
using std::min;
constexpr int warpSize = 32;

inline void __syncthreads(EMU_CALLER) { emu::sync_threads(EMU_HERE); }
inline void __syncwarp(unsigned mask = ~0u, EMU_CALLER) {
  emu::collective("__syncwarp", mask, nullptr, EMU_HERE, [](void**, unsigned) {}, true);
}
inline void __threadfence() { emu::order_before(&emu::g.fence), emu::order_after(&emu::g.fence); }
inline void __threadfence_block() {}
[[noreturn]] inline void __trap(EMU_CALLER) { emu::fail("__trap at " + EMU_HERE.str()); }

namespace emu {
struct Lane {
  uint64_t in, out;
  int arg;
};
enum class Shuffle { index, up, down, exclusive };

template <class T>
T shuffle(const char* name, Shuffle kind, unsigned mask, T v, int arg, int width, Site s) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  Lane op{0, 0, arg};
  std::memcpy(&op.in, &v, sizeof v);
  collective(name, mask, &op, s, [&](void** ops, unsigned m) {
    for (unsigned left = m; left; left &= left - 1) {
      const int lane = __builtin_ctz(left), first = lane & ~(width - 1), last = first + width - 1;
      Lane& self = *static_cast<Lane*>(ops[lane]);
      int from = lane;
      switch (kind) {
        case Shuffle::index:
          from = first | (self.arg & (width - 1));
          break;
        case Shuffle::up:
          from = lane - self.arg < first ? lane : lane - self.arg;
          break;
        case Shuffle::down:
          from = lane + self.arg > last ? lane : lane + self.arg;
          break;
        case Shuffle::exclusive:
          from = (lane ^ self.arg) > last ? lane : lane ^ self.arg;
          break;
      }
      if (!(m >> from & 1))
        fail(std::string(name) + ": lane " + std::to_string(lane) + " reads lane " + std::to_string(from) +
             ", which is not in the mask, at " + s.str());
      self.out = static_cast<Lane*>(ops[from])->in;
    }
  });
  std::memcpy(static_cast<void*>(&v), &op.out, sizeof v);
  return v;
}

template <class T, class F>
T warp_reduce(const char* name, unsigned mask, T v, Site s, F f) {
  std::pair<T, T> op{v, v};
  collective(name, mask, &op, s, [&](void** ops, unsigned m) {
    T total = static_cast<std::pair<T, T>*>(ops[__builtin_ctz(m)])->first;
    for (unsigned left = m & (m - 1); left; left &= left - 1)
      total = f(total, static_cast<std::pair<T, T>*>(ops[__builtin_ctz(left)])->first);
    for (unsigned left = m; left; left &= left - 1)
      static_cast<std::pair<T, T>*>(ops[__builtin_ctz(left)])->second = total;
  });
  return op.second;
}
}  // namespace emu

#define EMU_SHUFFLE(name, kind, type)                                                   \
  template <class T>                                                                    \
  T name(unsigned mask, T v, type arg, int width = 32, EMU_CALLER) {                    \
    return emu::shuffle(#name, emu::Shuffle::kind, mask, v, int(arg), width, EMU_HERE); \
  }
EMU_SHUFFLE(__shfl_sync, index, int)
EMU_SHUFFLE(__shfl_up_sync, up, unsigned)
EMU_SHUFFLE(__shfl_down_sync, down, unsigned)
EMU_SHUFFLE(__shfl_xor_sync, exclusive, int)
#undef EMU_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int p, EMU_CALLER) {
  return emu::warp_reduce("__ballot_sync", mask, p ? 1u << emu::g.cur->lane : 0u, EMU_HERE,
                          [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int p, EMU_CALLER) {
  return emu::warp_reduce("__any_sync", mask, p != 0, EMU_HERE, [](bool a, bool b) { return a || b; });
}
inline int __all_sync(unsigned mask, int p, EMU_CALLER) {
  return emu::warp_reduce("__all_sync", mask, p != 0, EMU_HERE, [](bool a, bool b) { return a && b; });
}
// The lanes of the mask that have the same value.
inline unsigned __match_any_sync(unsigned mask, int v, EMU_CALLER) {
  std::pair<int, unsigned> op{v, 0};
  emu::collective("__match_any_sync", mask, &op, EMU_HERE, [](void** ops, unsigned m) {
    const auto at = [&](int lane) { return static_cast<std::pair<int, unsigned>*>(ops[lane]); };
    for (int i = 0; i < 32; ++i)
      for (int j = 0; j < 32; ++j)
        if ((m >> i & 1) && (m >> j & 1) && at(i)->first == at(j)->first) at(i)->second |= 1u << j;
  });
  return op.second;
}
#define EMU_REDUCE(name, T, expr)                                                        \
  inline T name(unsigned mask, T v, EMU_CALLER) {                                        \
    return emu::warp_reduce(#name, mask, v, EMU_HERE, [](T a, T b) { return T(expr); }); \
  }
EMU_REDUCE(__reduce_add_sync, unsigned, a + b)
EMU_REDUCE(__reduce_add_sync, int, a + b)
EMU_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
EMU_REDUCE(__reduce_min_sync, int, a < b ? a : b)
EMU_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
EMU_REDUCE(__reduce_max_sync, int, a > b ? a : b)
EMU_REDUCE(__reduce_and_sync, unsigned, a& b)
EMU_REDUCE(__reduce_or_sync, unsigned, a | b)
EMU_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef EMU_REDUCE

// Atomics. Only one fiber runs at a time; they are real atomics so that ThreadSanitizer knows them.
namespace emu {
template <class T, class F>
T atomic_update(T* p, F f) {
  perhaps_yield();
  T old;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  for (T now = f(old); !__atomic_compare_exchange(p, &old, &now, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
       now = f(old)) {
  }
  return old;
}
}  // namespace emu
template <class T>
T atomicAdd(T* p, std::common_type_t<T> v) {
  return emu::atomic_update(p, [v](T o) { return T(o + v); });
}
template <class T>
T atomicSub(T* p, std::common_type_t<T> v) {
  return emu::atomic_update(p, [v](T o) { return T(o - v); });
}
template <class T>
T atomicMin(T* p, std::common_type_t<T> v) {
  return emu::atomic_update(p, [v](T o) { return o < v ? o : v; });
}
template <class T>
T atomicMax(T* p, std::common_type_t<T> v) {
  return emu::atomic_update(p, [v](T o) { return o > v ? o : v; });
}
template <class T>
T atomicAnd(T* p, std::common_type_t<T> v) {
  return emu::atomic_update(p, [v](T o) { return T(o & v); });
}
template <class T>
T atomicOr(T* p, std::common_type_t<T> v) {
  return emu::atomic_update(p, [v](T o) { return T(o | v); });
}
template <class T>
T atomicExch(T* p, std::common_type_t<T> v) {
  return emu::atomic_update(p, [v](T) { return v; });
}
template <class T>
T atomicCAS(T* p, std::common_type_t<T> want, std::common_type_t<T> v) {
  return emu::atomic_update(p, [=](T o) { return o == want ? v : o; });
}

// Scalar intrinsics.
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __float_as_uint(float v) {
  unsigned u;
  std::memcpy(&u, &v, 4);
  return u;
}
inline int __float_as_int(float v) {
  int u;
  std::memcpy(&u, &v, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}
inline float __int_as_float(int u) {
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}
inline float __expf(float v) { return expf(v); }
inline float __logf(float v) { return logf(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
  const uint64_t v = uint64_t(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= unsigned(v >> 8 * (s >> 4 * i & 7) & 0xff) << 8 * i;
  return r;
}

}  // namespace kimi
