// AVX-512 with VNNI: improves on AVX2 in products; every other slot is filled from there.
#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

constexpr Kernels table() {
  Kernels k{};
  k.name = "avx512";
  k.gemm = &avx512_gemm_kernels;
  k.quantized = &avx512_quantized_kernels;
  k.int8 = &avx512_int8_kernels;
  k.attention = &avx512_attention_kernels;
  return k;
}

}  // namespace

const Kernels avx512_kernels = table();

}  // namespace kimi::cpu
