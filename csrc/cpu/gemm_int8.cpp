#include "ops/gemm_int8.h"

#include <cmath>

#include "core/parallel.h"
#include "cpu/matmul.h"

namespace kimi::cpu {
namespace {

// Weight matrix [out, in] in int8 with a scale per group of inputs.
struct Int8Matrix {
  const int8_t* w;
  const bf16* scale;
  int n_in;

  const int8_t* at(int row, int begin) const { return w + int64_t(row) * n_in + begin; }
  const bf16* scale_at(int row, int begin) const { return scale + (int64_t(row) * n_in + begin) / kInt8Group; }

  void few(const Kernels& k, const float* const* x, int tokens, int row, int rows, float* sums) const {
    k.gemm->few_int8(x, tokens, at(row, 0), n_in, scale_at(row, 0), n_in / kInt8Group, rows, n_in, sums, kBlockRows);
  }
  void pack(const Kernels& k, int row, int rows, int begin, int n, int64_t ahead, float* panel) const {
    k.gemm->pack_int8(at(row, begin), n_in, ahead, scale_at(row, begin), n_in / kInt8Group, rows, n, panel);
  }
};

void quantize_group(const bf16* w, int8_t* q, bf16* scale) {
  float values[kInt8Group], largest = 0;
  bool finite = true;
  for (int i = 0; i < kInt8Group; i++) {
    values[i] = to_float(w[i]);
    finite = finite && std::isfinite(values[i]);
    largest = std::max(largest, std::fabs(values[i]));
  }
  *scale = finite ? to_bf16(largest / 127.0f) : bf16{0x7fc0};
  const float s = to_float(*scale);
  constexpr float kWhole = 3 << 22;  // a float of this size has no bits below the point: adding it rounds to even
  for (int i = 0; i < kInt8Group; i++)
    q[i] = s > 0 ? int8_t(std::clamp(values[i] / s + kWhole - kWhole, -127.0f, 127.0f)) : int8_t(0);
}

}  // namespace

void gemm_int8(const GemmInt8Params& p) {
  const Kernels& k = kernels();
  const Int8Matrix weight{p.weight, p.weight_scale, p.n_in};
  const Blocks blocks{p.T, p.n_out};
  parallel_for(blocks.count(), 1,
               [&](int64_t i, int64_t) { matmul_rows(k, p.x, p.x_stride, blocks, i, weight, p.out, p.out_stride); });
}

void quantize_int8(const QuantizeInt8Params& p) {
  constexpr int64_t kGroups = 1024;  // groups a thread takes at a time
  parallel_for(int64_t(p.n_out) * (p.n_in / kInt8Group), kGroups, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++)
      quantize_group(p.weight + g * kInt8Group, p.quantized + g * kInt8Group, p.weight_scale + g);
  });
}

}  // namespace kimi::cpu
