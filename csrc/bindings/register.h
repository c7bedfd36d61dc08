#pragma once
#include <nanobind/nanobind.h>

#include <optional>

#include "bindings/dispatch.h"
#include "bindings/tensor_caster.h"
#include "core/check.h"
#if defined(KIMI_CUDA)
#include "cuda/gpu.h"
#endif

namespace kimi {

// The place of a call is that of its first array; the op's checks name an argument that is elsewhere.
template <class First, class... Rest>
const Tensor& first_tensor(const First& first, const Rest&... rest) {
  if constexpr (std::is_same_v<First, Tensor>)
    return first;
  else
    return first_tensor(rest...);
}

// m.def of an op's bindings for both backends, either of which may be null, with the stream as last argument, which on
// the CPU is a Recording or 0. None comes through to the op's own checks, whose message names the argument.
template <class Result, class... Arguments>
void define(nanobind::module_& m, const char* name, Result (*on_cpu)(OnCpu, Arguments...),
            [[maybe_unused]] Result (*on_cuda)(OnCuda, Arguments...)) {
  m.def(
      name,
      [=](Arguments... arguments, uintptr_t stream) -> Result {
        const Tensor& first = first_tensor(arguments...);
        if (first.device == Device::Cpu && on_cpu)
          return on_cpu(OnCpu{reinterpret_cast<Recording*>(stream)}, arguments...);
#if defined(KIMI_CUDA)
        if (first.device == Device::Cuda && on_cuda) try {
            gpu::use_device(first.device_index);
            return on_cuda(OnCuda{reinterpret_cast<Stream>(stream), first.device_index}, arguments...);
          } catch (const gpu::Error& e) {
            throw std::runtime_error(message(name, ": ", e.what()));
          }
#endif
        throw std::runtime_error(message(name, first.device == Device::Cuda
                                                   ? ": this build has no CUDA kernel of it; build with KIMI_CUDA=ON"
                                                   : ": this build has no CPU kernel of it"));
      },
      (static_cast<void>(sizeof(Arguments)), nanobind::arg().none())..., nanobind::arg());
}

// KIMI_DEFINE(m, op): the binding `op` for every backend that this build has. KIMI_DEFINE_CPU: for the CPU alone.
#if defined(KIMI_EMULATOR)
#define KIMI_DEFINE(m, op) ::kimi::define(m, #op, ::kimi::null_of(&op<OnCuda>), &op<OnCuda>)
#define KIMI_DEFINE_CPU(m, op) static_cast<void>(m)
#elif defined(KIMI_CUDA)
#define KIMI_DEFINE(m, op) ::kimi::define(m, #op, &op<OnCpu>, &op<OnCuda>)
#define KIMI_DEFINE_CPU(m, op) ::kimi::define(m, #op, &op<OnCpu>, ::kimi::null_of(&op<OnCpu>))
#else
#define KIMI_DEFINE(m, op) ::kimi::define(m, #op, &op<OnCpu>, ::kimi::null_of(&op<OnCpu>))
#define KIMI_DEFINE_CPU(m, op) KIMI_DEFINE(m, op)
#endif

// A null binding for the other backend, of the same arguments.
template <class Result, class... Arguments>
auto null_of(Result (*)(OnCpu, Arguments...)) {
  return static_cast<Result (*)(OnCuda, Arguments...)>(nullptr);
}
template <class Result, class... Arguments>
auto null_of(Result (*)(OnCuda, Arguments...)) {
  return static_cast<Result (*)(OnCpu, Arguments...)>(nullptr);
}

void register_norm(nanobind::module_& m);
void register_linear(nanobind::module_& m);
void register_matmul(nanobind::module_& m);
void register_attention(nanobind::module_& m);
void register_moe(nanobind::module_& m);
void register_sampling(nanobind::module_& m);
void register_runtime(nanobind::module_& m);

}  // namespace kimi
