// Runs an op where its arrays live: on the CPU without the GIL, on the GPU in order with the stream it is given.
//
// A binding is a template over the backend, `template <class On> void op(On on, Tensor...)`: the activations it expects
// are On::Activation. It checks, fills the struct and ends in KIMI_RUN(on, op, params), or for an op without a CUDA
// kernel in KIMI_RUN_CPU.
#pragma once
#include <nanobind/nanobind.h>

#include <string>
#include <type_traits>

#include "bindings/recording.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace kimi {

struct OnCpu {
  using Activation = float;
  Recording* recording;  // where calls are written down as they are made, or null

  template <class Params, class Call>
  void run(const Params& p, const Call& call) const {
    {
      nanobind::gil_scoped_release release;
      call();
    }
    if (recording) recording->add(p, call);
  }
};

struct OnCuda {
  using Activation = bf16;
  Stream stream;
  int device_index;
};

template <class On>
constexpr bool kOnCpu = std::is_same_v<On, OnCpu>;

}  // namespace kimi

#define KIMI_RUN_CPU(on, op, params) on.run(params, [p = params] { cpu::op(p); })
#define KIMI_RUN(on, op, params)    \
  do {                              \
    if constexpr (kOnCpu<On>)       \
      KIMI_RUN_CPU(on, op, params); \
    else                            \
      cuda::op(params, on.stream);  \
  } while (0)

// The floats that the op wants as workspace.
#define KIMI_WORKSPACE(op, params)         \
  [&] {                                    \
    if constexpr (kOnCpu<On>)              \
      return cpu::op##_workspace(params);  \
    else                                   \
      return cuda::op##_workspace(params); \
  }()
