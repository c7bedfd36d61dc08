// Kernels that are wrong, each in one way, and a few right ones, for test_bugs.py to see what notices which.
//
// Run as: bugs NAME. Each kernel is to set y[t] = x[(t + 1) % T]; NAME runs in several orders of threads until one goes
// wrong. Prints "right", or "wrong" (the result), or "check: ..." (the emulator stopped the launch). Without NAME, the
// names of all.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "cuda/ptx.cuh"

namespace kimi {
namespace {

constexpr int T = 128;

// Right: neighbours exchange values through shared memory.
__global__ void right_exchange(const float* x, float* y) {
  GPU_SHARED(s, float[T]);
  const int t = threadIdx.x;
  for (int i = 0; i < 3; ++i) {
    s[t] = x[t] + i;
    __syncthreads();
    y[t] = s[(t + 1) % T] - i;
    __syncthreads();
  }
}

// Right: an atomic counts the threads of all blocks, any of which may be the last.
__global__ void right_atomic(const float* x, float* y) {  // grid of 4
  GPU_SHARED(last, bool);
  const int t = threadIdx.x;
  if (t == 0) last = atomicAdd(reinterpret_cast<unsigned*>(y + T), 1u) == gridDim.x - 1;
  __syncthreads();
  if (last) y[t] = x[(t + 1) % T];
}

__global__ void missing_barrier_before_read(const float* x, float* y) {
  GPU_SHARED(s, float[T]);
  const int t = threadIdx.x;
  s[t] = x[t];
  y[t] = s[(t + 1) % T];
}

__global__ void missing_barrier_before_overwrite(const float* x, float* y) {
  GPU_SHARED(s, float[T]);
  const int t = threadIdx.x;
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    s[t] = x[t] + i;
    __syncthreads();
    sum += s[(t + 1) % T] - i;
  }
  y[t] = sum / 4;
}

__global__ void missing_syncwarp(const float* x, float* y) {
  GPU_SHARED(s, float[T]);
  const int t = threadIdx.x, next = t / 32 * 32 + (t + 1) % 32;
  s[t] = x[t];
  const float v = s[next];  // of the same warp
  __syncthreads();
  y[t] = v - x[next] + x[(t + 1) % T];
}

__global__ void lost_update(const float* x, float* y) {
  GPU_SHARED(count, int);
  const int t = threadIdx.x;
  if (t == 0) count = 0;
  __syncthreads();
  count += 1;  // should be atomicAdd
  __syncthreads();
  y[t] = count == T ? x[(t + 1) % T] : 0;
}

__global__ void missing_copy_wait(const float* x, float* y) {
  GPU_SHARED(s, float[T]);
  const int t = threadIdx.x;
  if (t < T / 4) ptx::cp_async16(&s[4 * t], &x[4 * t]);
  ptx::cp_async_commit();
  __syncthreads();
  y[t] = s[(t + 1) % T];
  ptx::cp_async_wait<0>();
}

__global__ void missing_barrier_after_copy_wait(const float* x, float* y) {
  GPU_SHARED(s, float[T]);
  const int t = threadIdx.x;
  if (t < T / 4) ptx::cp_async16(&s[4 * t], &x[4 * t]);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  y[t] = s[(t + 1) % T];
}

__global__ void copy_into_buffer_being_read(const float* x, float* y) {
  GPU_SHARED(s, float[T]);
  const int t = threadIdx.x;
  s[t] = x[t];
  __syncthreads();
  if (t < T / 4) ptx::cp_async16(&s[4 * t], &x[T + 4 * t]);
  ptx::cp_async_commit();
  y[t] = s[(t + 1) % T];
  ptx::cp_async_wait<0>();
}

__global__ void uninitialised_shared(const float* x, float* y) {
  GPU_SHARED(s, float[T]);
  const int t = threadIdx.x;
  if (t > 0) s[t] = x[t];
  __syncthreads();
  y[t] = s[(t + 1) % T];
}

__global__ void shared_overrun(const float* x, float* y) {
  GPU_SHARED(s, float[T]);
  const int t = threadIdx.x;
  float* p = s;  // an index of the array itself is for UBSan to check
  p[t + 1] = x[t];
  __syncthreads();
  y[t] = x[(t + 1) % T];
}

__global__ void dynamic_shared_overrun(const float* x, float* y) {
  GPU_SHARED_DYNAMIC(memory, 16);
  float* s = reinterpret_cast<float*>(memory);  // the launch gives T floats
  const int t = threadIdx.x;
  s[t] = s[2 * T - 1 - t] = x[t];
  __syncthreads();
  y[t] = s[(t + 1) % T];
}

__global__ void global_overrun(const float* x, float* y) {
  const int t = threadIdx.x;
  y[t] = x[2 * T + t] * 0 + x[(t + 1) % T];
}

__global__ void misaligned_vector(const float* x, float* y) {
  const int t = threadIdx.x;
  const float4 v = *reinterpret_cast<const float4*>(x + t);
  y[t] = t == T - 1 ? x[0] : v.y;
}

__global__ void aligned_only_by_luck(const float* x, float* y) {
  GPU_SHARED_DYNAMIC(memory, 16);  // uses it as if aligned to 128
  const int t = threadIdx.x;
  y[t] = reinterpret_cast<uintptr_t>(memory) % 128 ? 0 : x[(t + 1) % T];
}

__global__ void divergent_barrier(const float* x, float* y) {
  const int t = threadIdx.x;
  if (t < T / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[t] = x[(t + 1) % T];
}

__global__ void barrier_after_return(const float* x, float* y) {
  const int t = threadIdx.x;
  y[t] = x[(t + 1) % T];
  if (t >= 100) return;
  __syncthreads();
}

__global__ void mask_names_absent_lanes(const float* x, float* y) {
  const int t = threadIdx.x;
  y[t] = x[(t + 1) % T];
  if (t % 32 < 16) y[t] += 0 * __shfl_xor_sync(~0u, x[t], 1);
}

__global__ void shuffle_reads_absent_lane(const float* x, float* y) {
  const int t = threadIdx.x;
  y[t] = x[(t + 1) % T];
  if (t % 32 < 16) y[t] += 0 * __shfl_xor_sync(0xffffu, x[t], 16);
}

__global__ void ldmatrix_from_global(const float* x, float* y) {
  const int t = threadIdx.x;
  unsigned r[4];
  ptx::ldmatrix_x4(r, x + t / 4 * 4);
  y[t] = x[(t + 1) % T] + (r[0] == 12345);
}

__global__ void undefined_shift(const float* x, float* y) {
  const int t = threadIdx.x;
  y[t] = x[(t + 1) % T] + 0 * (1 << t % 64);
}

__global__ void too_much_shared(const float* x, float* y) {
  GPU_SHARED(s, float[30000]);
  const int t = threadIdx.x;
  s[t] = 0;
  y[t] = x[(t + 1) % T];
}

__global__ void blocks_lost_update(const float* x, float* y) {  // grid of 4
  const int t = threadIdx.x;
  y[t] = blockIdx.x == 0 ? x[(t + 1) % T] : y[t];
  y[T] += 1;
}

// The last block to finish sums what all blocks left; without fences it may not see it.
__global__ void missing_fence(const float* x, float* y) {  // grid of 4
  GPU_SHARED(last, bool);
  const int t = threadIdx.x;
  if (t == 0) {
    y[T + blockIdx.x] = 1;
    last = atomicAdd(reinterpret_cast<unsigned*>(y + 2 * T - 1), 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last) y[t] = y[T] + y[T + 1] + y[T + 2] + y[T + 3] == 4 ? x[(t + 1) % T] : 0;
}

__global__ void right_fence(const float* x, float* y) {  // the same, right; grid of 4
  GPU_SHARED(last, bool);
  const int t = threadIdx.x;
  if (t == 0) {
    y[T + blockIdx.x] = 1;
    __threadfence();
    last = atomicAdd(reinterpret_cast<unsigned*>(y + 2 * T - 1), 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last) y[t] = y[T] + y[T + 1] + y[T + 2] + y[T + 3] == 4 ? x[(t + 1) % T] : 0;
}

// The same lost update, behind barriers: those of one block order nothing in another.
__global__ void blocks_lost_update_behind_barriers(const float* x, float* y) {  // grid of 4
  const int t = threadIdx.x;
  __syncthreads();
  if (t == 0) y[T] += 1;
  __syncthreads();
  if (blockIdx.x == 0) y[t] = x[(t + 1) % T];
}

__global__ void shared_memory_of_the_block_before(const float* x, float* y) {  // grid of 4
  GPU_SHARED(s, float[T]);
  const int t = threadIdx.x;
  if (blockIdx.x == 0) s[t] = x[t];
  __syncthreads();
  y[t] = s[(t + 1) % T];
}

__global__ void shuffle_instead_of_syncwarp(const float* x, float* y) {
  GPU_SHARED(s, float[T]);
  const int t = threadIdx.x, next = t / 32 * 32 + (t + 1) % 32;
  s[t] = x[t];
  const float zero = __shfl_xor_sync(~0u, 0.0f, 1);  // exchanges a value and orders no memory
  const float v = s[next];
  __syncthreads();
  y[t] = v - x[next] + x[(t + 1) % T] + zero;
}

__global__ void copy_to_global(const float* x, float* y) {
  const int t = threadIdx.x;
  y[t] = x[(t + 1) % T];
  if (t == 0) ptx::cp_async16(y + T, x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

__global__ void misaligned_copy(const float* x, float* y) {
  GPU_SHARED(s, float[T]);
  const int t = threadIdx.x;
  if (t == 0) ptx::cp_async16(s, x + 1);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  y[t] = x[(t + 1) % T];
}

__global__ void copy_in_flight_at_return(const float* x, float* y) {
  GPU_SHARED(s, float[T]);
  const int t = threadIdx.x;
  y[t] = x[(t + 1) % T];
  if (t == 0) ptx::cp_async16(s, x);
  ptx::cp_async_commit();
}

__global__ void copy_overruns_global(const float* x, float* y) {
  GPU_SHARED(s, float[T]);
  const int t = threadIdx.x;
  if (t == 0) ptx::cp_async16(s, x + 2 * T);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  y[t] = x[(t + 1) % T];
}

__global__ void barrier_counts_differ(const float* x, float* y) {
  const int t = threadIdx.x;
  ptx::barrier_sync(1, t < T / 2 ? T : T / 2);
  y[t] = x[(t + 1) % T];
}

__global__ void barrier_lacks_threads(const float* x, float* y) {
  const int t = threadIdx.x;
  y[t] = x[(t + 1) % T];
  if (t < T / 2) ptx::barrier_sync(1, T);
}

__global__ void lanes_at_different_collectives(const float* x, float* y) {
  const int t = threadIdx.x;
  y[t] = x[(t + 1) % T];
  if (t % 2)
    y[t] += 0 * __shfl_xor_sync(~0u, x[t], 2);
  else
    y[t] += 0 * __shfl_down_sync(~0u, x[t], 2);
}

__global__ void misaligned_ldmatrix(const float* x, float* y) {
  GPU_SHARED(s, float[T]);
  const int t = threadIdx.x;
  unsigned r[4];
  s[t] = 0;
  __syncthreads();
  ptx::ldmatrix_x4(r, s + t % 32);
  y[t] = x[(t + 1) % T] + r[0];
}

struct Case {
  void (*kernel)(const float*, float*);
  int blocks = 1;
  size_t dynamic_shared = 0;
};

#define CASE(name, ...)                        \
  {                                            \
    #name, { name __VA_OPT__(, ) __VA_ARGS__ } \
  }
const std::map<std::string, Case> cases = {CASE(right_exchange),
                                           CASE(right_atomic, 4),
                                           CASE(missing_barrier_before_read),
                                           CASE(missing_barrier_before_overwrite),
                                           CASE(missing_syncwarp),
                                           CASE(lost_update, 4),
                                           CASE(missing_copy_wait),
                                           CASE(missing_barrier_after_copy_wait),
                                           CASE(copy_into_buffer_being_read),
                                           CASE(uninitialised_shared),
                                           CASE(shared_overrun),
                                           CASE(dynamic_shared_overrun, 1, T * sizeof(float)),
                                           CASE(global_overrun),
                                           CASE(misaligned_vector),
                                           CASE(aligned_only_by_luck, 1, 1024),
                                           CASE(divergent_barrier),
                                           CASE(barrier_after_return),
                                           CASE(mask_names_absent_lanes),
                                           CASE(shuffle_reads_absent_lane),
                                           CASE(ldmatrix_from_global),
                                           CASE(undefined_shift),
                                           CASE(too_much_shared),
                                           CASE(blocks_lost_update, 4),
                                           CASE(missing_fence, 4),
                                           CASE(right_fence, 4),
                                           CASE(blocks_lost_update_behind_barriers, 4),
                                           CASE(shared_memory_of_the_block_before, 4),
                                           CASE(shuffle_instead_of_syncwarp),
                                           CASE(copy_to_global),
                                           CASE(misaligned_copy),
                                           CASE(copy_in_flight_at_return),
                                           CASE(copy_overruns_global),
                                           CASE(barrier_counts_differ),
                                           CASE(barrier_lacks_threads),
                                           CASE(lanes_at_different_collectives),
                                           CASE(misaligned_ldmatrix)};

int run(const Case& c, emu::Order order, uint64_t seed) {
  emu::g.config.order = order;
  emu::g.config.seed = seed;
  // 16-byte aligned, and nothing of ours behind them
  auto* x = static_cast<float*>(std::aligned_alloc(16, 2 * T * sizeof(float)));
  auto* y = static_cast<float*>(std::aligned_alloc(16, 2 * T * sizeof(float)));
  for (int i = 0; i < 2 * T; ++i) x[i] = float(i % T) + (i < T ? 0 : 1000), y[i] = 0;
  try {
    gpu::launch(c.kernel, dim3(c.blocks), dim3(T), c.dynamic_shared, nullptr, x, y);
  } catch (const std::exception& e) {
    std::printf("check: %s\n", e.what());
    return 3;
  }
  for (int t = 0; t < T; ++t)
    if (!(y[t] == float((t + 1) % T))) {
      std::puts("wrong");
      return 2;
    }
  return 0;
}

}  // namespace
}  // namespace kimi

int main(int count, char** arguments) {
  using namespace kimi;
  if (count < 2) {
    for (const auto& [name, c] : cases) std::puts(name.c_str());
    return 0;
  }
  const Case& c = cases.at(arguments[1]);
  const std::pair<emu::Order, int> orders[] = {
      {emu::Order::ascending, 0}, {emu::Order::descending, 0}, {emu::Order::random, 0}, {emu::Order::random, 1}};
  for (const auto& [order, seed] : orders)
    if (const int fault = run(c, order, seed)) return fault;
  std::puts("right");
}
