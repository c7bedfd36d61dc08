#include "ops/top_k_top_p_sample.h"

#include <algorithm>

#include "cuda/device.cuh"

namespace kimi::cuda {
namespace {

using Params = TopKTopPSampleParams;
using Mass = unsigned long long;  // sum of weights in units so small that their number is exact in any order

constexpr int kMaxThreads = 1024;
constexpr float kLog2E = 1.4426950408889634f;

// A token's weight is 2^-d, d = (largest logit - its logit) * log2(e) / temperature. Its key is 1 + d as float32, minus
// the bits of 1: it ranks tokens, most likely first, has 27 bits, and spreads them where weights matter, so that few
// threads meet in one bin of its upper bits. Tokens of one key have one weight and go by index.
constexpr unsigned kOne = 0x3f800000;
constexpr float kFarthest = 1023;  // 2^-1023: no weight; -inf and NaN
constexpr int kCoarseShift = 16, kFineShift = 8, kFine = 256, kCoarse = (10 << (23 - kCoarseShift)) + 1;

PTX_FN unsigned key_of(float d) { return __float_as_uint(1.0f + fminf(d, kFarthest)) - kOne; }
PTX_FN Mass weight_of(unsigned key, float unit) {
  return Mass(ptx::exp2_approx(1.0f - __uint_as_float(key + kOne)) * unit);
}

struct Bin {
  unsigned count, low, high;  // tokens, and their mass in two words

  PTX_FN Mass mass() const { return Mass(high) << 32 | low; }
  PTX_FN void add(Mass weight) {
    const unsigned part = unsigned(weight), carry = atomicAdd(&low, part) + part < part;
    const unsigned upper = unsigned(weight >> 32) + carry;
    if (upper) atomicAdd(&high, upper);
    atomicAdd(&count, 1u);
  }
};

// A key, and what ranks above it.
struct Place {
  unsigned key, count, ties;  // ties: tokens of this key
  Mass mass;
};

// What leads to a place: the token of a rank, the one at which the mass reaches a target, or the key itself.
enum class By { count, mass, key };

// Goes down to one of n bins, those of the key's bits from `shift` on. One warp.
PTX_FN void pick_bin(const Bin* bins, int n, int shift, By by, Mass target, Place& place) {
  const int lane = threadIdx.x % kWarp, first = lane * (n / kWarp + 1), last = min(n, first + n / kWarp + 1);
  unsigned count = 0;
  Mass mass = 0;
  for (int i = first; i < last; ++i) count += bins[i].count, mass += bins[i].mass();
  unsigned count_up_to = count;
  Mass mass_up_to = mass;
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    const unsigned c = __shfl_up_sync(~0u, count_up_to, d);
    const Mass m = __shfl_up_sync(~0u, mass_up_to, d);
    if (lane >= d) count_up_to += c, mass_up_to += m;
  }
  Place at = place;
  __syncwarp();  // before one lane changes it
  at.count += count_up_to - count, at.mass += mass_up_to - mass;
  for (int i = first; i < last; ++i) {
    const Bin& bin = bins[i];
    const bool here = by == By::count  ? at.count < target && target <= at.count + bin.count
                      : by == By::mass ? at.mass < target && target <= at.mass + bin.mass()
                                       : int(target >> shift) % n == i;
    if (here) place = {at.key | unsigned(i) << shift, at.count, bin.count, at.mass};
    at.count += bin.count, at.mass += bin.mass();
  }
}

// A block a row. `unit` is the mass of weight 1.
struct Row {
  const int* keys;
  int V;
  float unit;
  Bin *coarse, *fine;  // coarse: all tokens by the upper bits of their keys
  Place& place;

  // Sets `place`. The whole block.
  PTX_FN void find(By by, Mass target) const {
    __syncthreads();  // the last place has been read
    if (threadIdx.x == 0) place = {};
    __syncthreads();
    if (threadIdx.x < kWarp) pick_bin(coarse, kCoarse, kCoarseShift, by, target, place);
    for (int shift = kFineShift; shift >= 0; shift -= kFineShift) {
      for (int i = threadIdx.x; i < kFine; i += blockDim.x) fine[i] = {};
      __syncthreads();
      const unsigned prefix = place.key >> (shift + kFineShift);
#pragma unroll 8
      for (int i = threadIdx.x; i < V; i += blockDim.x) {
        const unsigned key = keys[i];
        if (key >> (shift + kFineShift) == prefix) fine[key >> shift & (kFine - 1)].add(weight_of(key, unit));
      }
      __syncthreads();
      if (threadIdx.x < kWarp) pick_bin(fine, kFine, shift, by, target, place);
      __syncthreads();
    }
  }

  // Writes the index of the token of this rank, from 0, among those of one key. The whole block.
  PTX_FN void write_index(unsigned key, unsigned rank, Mass* part, int* id) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    const int each = (V + warps - 1) / warps, begin = warp * each, end = min(V, begin + each);
    const auto ties = [&](int i) { return __ballot_sync(~0u, i + lane < end && unsigned(keys[i + lane]) == key); };
    unsigned count = 0, before = 0;
    for (int i = begin; i < end; i += kWarp) count += __popc(ties(i));
    if (lane == 0) part[warp] = count;
    __syncthreads();
    for (int i = 0; i < warp; ++i) before += unsigned(part[i]);
    if (rank < before || rank >= before + count) return;
    for (int i = begin; i < end; i += kWarp) {
      unsigned left = ties(i);
      const unsigned n = __popc(left);
      if (rank >= before + n) {
        before += n;
        continue;
      }
      for (; before < rank; ++before) left &= left - 1;
      if (lane == 0) *id = i + __ffs(int(left)) - 1;
      return;
    }
  }
};

// As block_reduce, for the block's own number of threads.
template <class F>
PTX_FN Mass reduce(Mass v, Mass (&part)[kMaxThreads / kWarp], F f) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  v = warp_reduce(v, f);
  if (lane == 0) part[warp] = v;
  __syncthreads();
  v = warp_reduce(lane < int(blockDim.x) / kWarp ? part[lane] : Mass(0), f);
  __syncthreads();
  return v;
}

PTX_FN float without_nan(float logit) { return logit == logit ? logit : -INFINITY; }

// Larger for larger logits, then for lower indices.
PTX_FN Mass rank_of(float logit, int i) {
  const unsigned bits = __float_as_uint(logit + 0.0f);  // -0 is 0
  return Mass(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | ~unsigned(i);
}
PTX_FN float logit_of(Mass rank) {
  const unsigned bits = unsigned(rank >> 32);
  return __uint_as_float(bits >> 31 ? bits & 0x7fffffff : ~bits);
}

__global__ void __launch_bounds__(kMaxThreads, 1) top_k_top_p_sample_kernel(Params p, float unit) {
  GPU_SHARED(coarse, Bin[kCoarse]);
  GPU_SHARED(fine, Bin[kFine]);
  GPU_SHARED(place, Place);
  GPU_SHARED(part, Mass[kMaxThreads / kWarp]);
  const int b = blockIdx.x, threads = blockDim.x, top_k = p.top_k[b];
  const float uniform = p.uniform[b], temperature = p.temperature[b], top_p = p.top_p[b], min_p = p.min_p[b];
  const float* logits = p.logits + b * p.logits_stride;
  int* keys = p.order + int64_t(b) * p.V;

  Mass best = 0;
#pragma unroll 8
  for (int i = threadIdx.x; i < p.V; i += threads) best = Max()(best, rank_of(without_nan(logits[i]), i));
  best = reduce(best, part, Max());
  const float largest = logit_of(best);
  const bool valid = uniform >= 0 && uniform < 1 && temperature >= 0 && temperature < INFINITY && top_k >= 0 &&
                     top_p > 0 && top_p <= 1 && min_p >= 0 && min_p <= 1;
  const bool finite = largest > -INFINITY && largest < INFINITY;
  if (!valid || !finite || temperature == 0) {
    if (threadIdx.x == 0) p.ids[b] = valid && finite ? int(~unsigned(best)) : -1;
    return;
  }

  for (int i = threadIdx.x; i < kCoarse; i += threads) coarse[i] = {};
  __syncthreads();
  Mass total = 0;
  const float slope = kLog2E / temperature;
#pragma unroll 4
  for (int i = threadIdx.x; i < p.V; i += threads) {
    const float behind = largest - without_nan(logits[i]);
    const unsigned key = key_of(behind > 0 ? behind * slope : 0.0f);
    const Mass weight = weight_of(key, unit);
    coarse[key >> kCoarseShift].add(weight);
    keys[i] = int(key), total += weight;
  }
  total = reduce(total, part, Add());

  // Which tokens may be drawn: all that rank up to a place; `total` is their mass.
  const Row row{keys, p.V, unit, coarse, fine, place};
  unsigned last = ~0u;  // key
  if (top_k > 0 && top_k < p.V) {
    row.find(By::count, top_k);
    last = place.key, total = place.mass + (top_k - place.count) * weight_of(last, unit);
  }
  if (top_p < 1) {
    const Mass target = Mass(ceil(double(top_p) * double(total)));  // 1 to total, as top_p > 0 and < 1
    row.find(By::mass, target);
    last = place.key;
    const Mass weight = weight_of(last, unit), count = (target - place.mass + weight - 1) / weight;
    total = place.mass + count * weight;
  }
  const unsigned least = key_of(-log2f(min_p));
  if (least < last && min_p > 0) {
    row.find(By::key, least);
    total = place.mass + place.ties * weight_of(least, unit);
  }
  const Mass target = Mass(double(uniform) * double(total)) + 1;  // at most total: uniform is 1 - 2^-24 at most
  row.find(By::mass, target);
  row.write_index(place.key, unsigned((target - place.mass - 1) / weight_of(place.key, unit)), part, p.ids + b);
}

}  // namespace

void top_k_top_p_sample(const Params& p, Stream stream) {
  const int threads = std::min(kMaxThreads, ceil_div(p.V, 16 * kWarp) * kWarp);  // 16 tokens or more a thread
  const float unit = p.V <= 1 << 19 ? 0x1p44f : 0x1p32f;                         // no sum passes 2^63
  gpu::launch(top_k_top_p_sample_kernel, dim3(p.B), dim3(std::max(kWarp, threads)), 0, stream, p, unit);
}

}  // namespace kimi::cuda
