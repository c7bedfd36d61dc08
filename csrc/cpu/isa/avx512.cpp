// AVX-512 with VNNI: improves on AVX2 where integers are multiplied; every other slot is filled from there.
#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

constexpr Kernels table() {
  Kernels k{};
  k.name = "avx512";
  k.quantized = &avx512_quantized_kernels;
  k.int8 = &avx512_int8_kernels;
  return k;
}

}  // namespace

const Kernels avx512_kernels = table();

}  // namespace kimi::cpu
