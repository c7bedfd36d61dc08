// The one door to the CUDA runtime: launching, shared memory, errors as exceptions, what the device is.
//
// One kernel source serves two compilers. nvcc builds it for the chip; without nvcc's __CUDACC__ and with KIMI_EMULATOR
// it runs on the host by emu/emu.h. Plain host code (the bindings) sees the functions at the top alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "core/dtype.h"
#include "core/stream.h"

namespace kimi::gpu {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct DeviceFacts {
  int compute_capability;  // 80, 90, ...
  int multiprocessors;
  int shared_per_block;           // bytes a block may have at most
  int shared_per_multiprocessor;  // bytes
};

void use_device(int index);   // makes it current; Error without driver, device or compute capability 8.0
const DeviceFacts& device();  // of the current device
void zero(void* data, size_t bytes, Stream stream);

}  // namespace kimi::gpu

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <string>

namespace kimi::gpu {

template <class T>
using type_t = T;  // lets an array type stand before a name

inline void check(cudaError_t e, const char* what) {
  if (e != cudaSuccess) throw Error(std::string(what) + ": " + cudaGetErrorString(e));
}

// Blocks of this kernel that one multiprocessor holds at once.
template <class... P>
int blocks_per_multiprocessor(void (*kernel)(P...), int threads, size_t shared) {
  int blocks = 0;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), "shared memory");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared), "occupancy");
  return blocks;
}

// An empty grid launches nothing.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream stream, A... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > 16 << 10)  // more than 48 KB have to be asked for, and static shared memory counts
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), "shared memory");
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(P(args)...);
  check(cudaGetLastError(), "launch");
}

}  // namespace kimi::gpu

#define GPU_SHARED(name, ...) __shared__::kimi::gpu::type_t<__VA_ARGS__> name
#define GPU_SHARED_DYNAMIC(name, align) \
  extern __shared__ __align__(align)    \
  unsigned char name[]

#elif defined(KIMI_EMULATOR)

#include "cuda/emu/cuda_names.h"
#include "cuda/emu/emu.h"

namespace kimi::gpu {

template <class... P>
int blocks_per_multiprocessor(void (*)(P...), int, size_t) {
  return 1;
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream, A... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  emu::run(grid, block, shared, [&] { kernel(P(args)...); });
}

}  // namespace kimi::gpu

#define GPU_SHARED(name, ...)     \
  static const char name##_key{}; \
  auto& name = ::kimi::emu::shared_variable<__VA_ARGS__>(&name##_key)
#define GPU_SHARED_DYNAMIC(name, align)                         \
  unsigned char* const name = reinterpret_cast<unsigned char*>( \
      ::kimi::emu::allocate_shared(&::kimi::emu::g.dynamic, ::kimi::emu::g.dynamic, align))

#endif
