// The vector types of CUDA that kernels and launches name.
#pragma once

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct uint3 {
  unsigned x, y, z;
};

#define KIMI_VECTOR(type, name)                            \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; }; \
  struct alignas(16) name##4 { type x, y, z, w; };
KIMI_VECTOR(float, float)
KIMI_VECTOR(int, int)
KIMI_VECTOR(unsigned, uint)
#undef KIMI_VECTOR
