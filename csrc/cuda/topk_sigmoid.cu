#include "ops/topk_sigmoid.h"

#include <climits>
#include <string>

#include "cuda/device.cuh"

namespace kimi::cuda {
namespace {

constexpr int kWarps = 4;  // tokens a block
constexpr int kMaxExperts = 1024;
constexpr int kNoExpert = INT_MIN, kNan = INT_MIN + 1;  // keys below that of -inf

// Right to about two units in the last place. The same for equal arguments wherever it is called: an expert is weighed
// by the number that chose it.
__device__ float sigmoid(float x) { return ptx::reciprocal(1.0f + expf(-x)); }

// Ascending with the choice, NaN lowest. -0 does not occur: a sigmoid is never -0, and the sum of 0 and -0 is 0.
__device__ int key_of(float choice) {
  const int bits = __float_as_int(choice);
  return choice != choice ? kNan : bits ^ (bits >> 31 & INT_MAX);
}

// One warp a token. A lane holds the keys of kEach experts, in ascending order of experts, and at hand the two best of
// those not yet chosen; a round takes the best of all lanes. A lane that has given both looks for its next two.
// Vector: rows and bias allow 16-byte loads, so a lane holds four adjacent experts of every 128.
template <int kEach, bool Vector>
__global__ void __launch_bounds__(kWarps* kWarp)
    topk_sigmoid_kernel(const float* logits, int64_t logits_stride, const float* bias, float* weights, int32_t* ids,
                        int T, int E, int K, float routed_scaling_factor, bool norm_topk_prob) {
  const int64_t t = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (t >= T) return;  // the whole warp
  logits += t * logits_stride, weights += t * K, ids += t * K;
  const auto expert = [&](int i) { return Vector ? i / 4 * 4 * kWarp + 4 * lane + i % 4 : i * kWarp + lane; };

  int key[kEach];
  if constexpr (Vector) {
    float4 x[kEach / 4], b[kEach / 4];
#pragma unroll
    for (int i = 0; i < kEach / 4; ++i) {
      const bool inside = expert(4 * i) < E;
      x[i] = inside ? *reinterpret_cast<const float4*>(logits + expert(4 * i)) : float4{};
      b[i] = inside ? *reinterpret_cast<const float4*>(bias + expert(4 * i)) : float4{};
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float4 &xs = x[i / 4], &bs = b[i / 4];
      const int j = i % 4;
      const float logit = j == 0 ? xs.x : j == 1 ? xs.y : j == 2 ? xs.z : xs.w;
      const float added = j == 0 ? bs.x : j == 1 ? bs.y : j == 2 ? bs.z : bs.w;
      key[i] = key_of(sigmoid(logit) + added);
    }
  } else {
    float x[kEach], b[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      x[i] = expert(i) < E ? logits[expert(i)] : 0;
      b[i] = expert(i) < E ? bias[expert(i)] : 0;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) key[i] = key_of(sigmoid(x[i]) + b[i]);
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) key[i] = expert(i) < E ? key[i] : kNoExpert;

  unsigned chosen = 0;  // bit i: key[i]
  int best, second;     // keys
  int at, next;         // their places in key
  const auto look = [&] {
    best = second = kNoExpert, at = next = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int k = chosen >> i & 1 ? kNoExpert : key[i];
      const bool first = k > best, other = k > second;  // not >=: of equals the lower index stays ahead
      next = first ? at : other ? i : next;
      second = first ? best : other ? k : second;
      at = first ? i : at;
      best = first ? k : best;
    }
  };
  look();

  float sum = 0, score = 0;
  for (int k = 0; k < K; k += kWarp) {  // lane l fills slot k + l
    int id = 0;
    for (int l = 0; l < min(kWarp, K - k); ++l) {
      const int top = __reduce_max_sync(~0u, best);
      const int e = __reduce_min_sync(~0u, best == top ? expert(at) : INT_MAX);
      if (l == lane) id = e;
      if (e == expert(at)) {
        chosen |= 1u << at;
        best = second, at = next, second = kNoExpert;
        if (best == kNoExpert) look();
      }
    }
    if (k + lane < K) {
      score = sigmoid(logits[id]);
      sum += score;
      ids[k + lane] = id;
      if (k + kWarp < K) weights[k + lane] = score;
    }
  }
  sum = warp_reduce(sum, Add());
  const float factor = routed_scaling_factor / (norm_topk_prob ? sum + 1e-20f : 1.0f);
  const int last = (K - 1) / kWarp * kWarp;  // slots whose scores are still at hand
#pragma unroll 1
  for (int k = lane; k < last; k += kWarp) weights[k] *= factor;
  if (last + lane < K) weights[last + lane] = score * factor;
}

}  // namespace

void topk_sigmoid(const TopkSigmoidParams& p, Stream stream) {
  if (p.E > kMaxExperts)
    throw gpu::Error("E is " + std::to_string(p.E) + ", expected at most " + std::to_string(kMaxExperts));
  const bool vector = p.E % 4 == 0 && p.logits_stride % 4 == 0 && aligned16(p.logits) && aligned16(p.bias);
  const auto kernel = p.E > 12 * kWarp ? topk_sigmoid_kernel<kMaxExperts / kWarp, false>
                      : vector         ? topk_sigmoid_kernel<12, true>
                                       : topk_sigmoid_kernel<12, false>;
  gpu::launch(kernel, dim3(ceil_div(p.T, kWarps)), dim3(kWarps * kWarp), 0, stream, p.logits, p.logits_stride, p.bias,
              p.weights, p.ids, p.T, p.E, p.K, p.routed_scaling_factor, p.norm_topk_prob);
}

}  // namespace kimi::cuda
