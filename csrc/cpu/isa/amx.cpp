// AMX: improves on AVX-512 where many tokens meet INT4 weights as integers; every other slot is filled from there.
#include "cpu/kernels.h"

namespace kimi::cpu {
namespace {

constexpr Kernels table() {
  Kernels k{};
  k.name = "amx";
  k.quantized = &amx_quantized_kernels;
  return k;
}

}  // namespace

const Kernels amx_kernels = table();

}  // namespace kimi::cpu
