#include "ops/dequantize_int4.h"

#include <algorithm>
#include <cmath>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

constexpr int64_t kGroups = 1024;  // groups a thread takes at a time

uint32_t nibble(float value, float scale) {
  return uint32_t(int(std::clamp(std::nearbyint(value / scale), -7.0f, 7.0f)) + 8);
}

// One group of 32 inputs to four words and a scale.
void quantize_group(const float* w, int32_t* packed, bf16* scale) {
  float largest = 0;
  bool finite = true;
  for (int i = 0; i < kInt4Group; i++) {
    finite = finite && std::isfinite(w[i]);
    largest = std::max(largest, std::fabs(w[i]));
  }
  *scale = finite ? to_bf16(std::max(largest / 7.0f, 1e-5f)) : bf16{0x7fc0};
  const float s = to_float(*scale);
  for (int word = 0; word < kInt4Group / 8; word++) {
    uint32_t bits = 0;
    for (int i = 0; i < 8; i++) bits |= (finite ? nibble(w[word * 8 + i], s) : 8u) << (4 * i);
    packed[word] = int32_t(bits);
  }
}

}  // namespace

void dequantize_int4(const DequantizeInt4Params& p) {
  const Kernels& k = kernels();
  const auto* packed = reinterpret_cast<const uint8_t*>(p.weight_packed);
  parallel_for(int64_t(p.n_out) * (p.n_in / kInt4Group), kGroups, [&](int64_t begin, int64_t end) {
    float values[kInt4Group];
    for (int64_t g = begin; g < end; g++) {
      k.decode_int4(packed + g * (kInt4Group / 2), p.weight_scale + g, values, 1);
      k.narrow(values, p.out + g * kInt4Group, kInt4Group);
    }
  });
}

void quantize_int4(const QuantizeInt4Params& p) {
  parallel_for(int64_t(p.n_out) * (p.n_in / kInt4Group), kGroups, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++)
      quantize_group(p.weight + g * kInt4Group, p.weight_packed + g * (kInt4Group / 8), p.weight_scale + g);
  });
}

}  // namespace kimi::cpu
