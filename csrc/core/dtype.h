// Element types of arrays, and bf16 with its scalar conversions.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define KIMI_BOTH __host__ __device__
#else
#define KIMI_BOTH
#endif

namespace kimi {

enum class DType : uint8_t { F32, BF16, I32, I64, I8, Other };

struct bf16 {
  uint16_t bits;
};

// static: each file keeps its own copy, so that the linker can never put one built with AVX flags into common code.
KIMI_BOTH static inline float to_float(bf16 v) {
  uint32_t u = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Rounds to nearest even; NaN stays a (quiet) NaN.
KIMI_BOTH static inline bf16 to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return {uint16_t((u >> 16) | 0x40)};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

}  // namespace kimi
