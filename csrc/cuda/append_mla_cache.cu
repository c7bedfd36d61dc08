#include "ops/append_mla_cache.h"

#include "cuda/rope.cuh"

namespace kimi::cuda {
namespace {

constexpr int kWarps = 4;  // of a block; two a token, one for the latent and one for the rope part, which never meet

// Which token and part a warp has, and where it goes.
struct Place {
  int64_t t;
  bool latent;
  bf16* row;  // null: there is nothing to write. Known late, so that no load has to wait for it

  __device__ Place(bf16* cache, const int64_t* slots, int64_t num_slots, int T, int width) {
    const int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    t = warp / 2, latent = warp % 2 == 0;
    const int64_t slot = t < T ? slots[t] : -1;
    row = slot >= 0 && slot < num_slots ? cache + slot * width : nullptr;
  }
};

// A lane copies kStep elements at a time.
template <int kStep>
__global__ void __launch_bounds__(kWarps* kWarp)
    append_mla_cache_kernel(const bf16* __restrict__ latent, int64_t latent_stride, const bf16* __restrict__ k_pe,
                            int64_t k_pe_stride, bf16* cache, const int64_t* slots, int64_t num_slots, int T, int C,
                            int R) {
  const Place place(cache, slots, num_slots, T, C + R);
  if (place.t >= T) return;
  const bf16* from = place.latent ? latent + place.t * latent_stride : k_pe + place.t * k_pe_stride;
  const int to = place.latent ? 0 : C, n = place.latent ? C : R;
  using Part = std::conditional_t<kStep == 8, uint4, bf16>;
#pragma unroll 2
  for (int i = threadIdx.x % kWarp * kStep; i < n; i += kWarp * kStep) {
    const Part part = *reinterpret_cast<const Part*>(from + i);
    if (place.row) *reinterpret_cast<Part*>(place.row + to + i) = part;
  }
}

// The latent is read once from memory for the norm and once more from the cache of the chip. Vector: all rows and
// tables allow 16-byte loads.
template <bool Vector>
__global__ void __launch_bounds__(kWarps* kWarp)
    fused_append_mla_cache_kernel(const bf16* __restrict__ kv, int64_t kv_stride, const bf16* __restrict__ weight,
                                  const float* __restrict__ cos, const float* __restrict__ sin,
                                  const int32_t* positions, bf16* cache, const int64_t* slots, int64_t num_slots, int T,
                                  int C, int R, int P, float eps) {
  constexpr int kStep = Vector ? 8 : 1, kPairs = Vector ? 8 : 2;  // elements of the latent, of the rope part
  const int lane = threadIdx.x % kWarp;
  const Place place(cache, slots, num_slots, T, C + R);
  if (place.t >= T) return;  // the whole warp
  kv += place.t * kv_stride;

  if (!place.latent) {
#pragma unroll 1
    for (int r = lane * kPairs; r < R; r += kWarp * kPairs) {
      float v[kPairs];
      load(kv + C + r, v);
      rotate_at(v, cos, sin, positions[place.t], P, R, r / 2);
      if (place.row) store(place.row + C + r, v);
    }
    return;
  }
  float sum = 0;
#pragma unroll 2  // 512 elements in vectors: all loads at once
  for (int c = lane * kStep; c < C; c += kWarp * kStep) {
    float v[kStep];
    load(kv + c, v);
#pragma unroll
    for (float x : v) sum += x * x;
  }
  const float scale = 1.0f / sqrtf(warp_reduce(sum, Add()) / float(C) + eps);
  if (!place.row) return;
#pragma unroll 2  // 512 elements in vectors: all loads at once
  for (int c = lane * kStep; c < C; c += kWarp * kStep) {
    float v[kStep], w[kStep];
    load(kv + c, v);
    load(weight + c, w);
#pragma unroll
    for (int i = 0; i < kStep; ++i) v[i] *= scale * w[i];
    store(place.row + c, v);
  }
}

}  // namespace

void append_mla_cache(const AppendMlaCacheParams<bf16>& p, Stream stream) {
  const bool vector = p.C % 8 == 0 && p.R % 8 == 0 && p.latent_stride % 8 == 0 && p.k_pe_stride % 8 == 0 &&
                      aligned16(p.latent) && aligned16(p.k_pe) && aligned16(p.cache);
  gpu::launch(vector ? append_mla_cache_kernel<8> : append_mla_cache_kernel<1>,
              dim3(ceil_div(2 * int64_t(p.T), kWarps)), dim3(kWarps * kWarp), 0, stream, p.latent, p.latent_stride,
              p.k_pe, p.k_pe_stride, static_cast<bf16*>(p.cache), p.slots, p.num_slots, p.T, p.C, p.R);
}

void fused_append_mla_cache(const FusedAppendMlaCacheParams<bf16>& p, Stream stream) {
  const bool vector = p.C % 8 == 0 && p.R % 8 == 0 && p.kv_stride % 8 == 0 && aligned16(p.kv) && aligned16(p.weight) &&
                      aligned16(p.cos) && aligned16(p.sin) && aligned16(p.cache);
  gpu::launch(vector ? fused_append_mla_cache_kernel<true> : fused_append_mla_cache_kernel<false>,
              dim3(ceil_div(2 * int64_t(p.T), kWarps)), dim3(kWarps * kWarp), 0, stream, p.kv, p.kv_stride, p.weight,
              p.cos, p.sin, p.positions, static_cast<bf16*>(p.cache), p.slots, p.num_slots, p.T, p.C, p.R, p.P, p.eps);
}

}  // namespace kimi::cuda
