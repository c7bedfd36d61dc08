// AVX-512: improves nothing over AVX2 yet, so every slot is filled from there.
#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

constexpr Kernels table() {
  Kernels k{};
  k.name = "avx512";
  return k;
}

}  // namespace

const Kernels avx512_kernels = table();

}  // namespace kimi::cpu
