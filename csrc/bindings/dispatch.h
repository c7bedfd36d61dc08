// Runs an op on the CPU without the GIL, so that other Python threads go on.
#pragma once
#include <nanobind/nanobind.h>

namespace kimi {

template <class Params>
void run(void (*op)(const Params&), const Params& params) {
  nanobind::gil_scoped_release release;
  op(params);
}

}  // namespace kimi
