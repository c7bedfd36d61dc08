#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/register.h"
#include "core/check.h"
#if defined(KIMI_CUDA)
#include "cuda/gpu.h"
#endif
#if !defined(KIMI_EMULATOR)
#include "core/parallel.h"
#include "cpu/kernels.h"
#endif

using namespace nanobind::literals;

namespace kimi {
namespace {

#if defined(KIMI_EMULATOR)

// order: 0 ascending, 1 descending, 2 random by seed.
void configure(int order, uint64_t seed, int multiprocessors, int shared_per_block, int compute_capability) {
  check(order >= 0 && order <= 2, "configure: order is ", order, ", expected 0, 1 or 2");
  emu::g.config.order = emu::Order(order), emu::g.config.seed = seed;
  emu::g.config.device.multiprocessors = multiprocessors;
  emu::g.config.device.shared_per_block = shared_per_block;
  emu::g.config.device.compute_capability = compute_capability;
}

// What kernels have done since the module was loaded: mma, ldmatrix, extra passes of ldmatrix for bank conflicts.
std::vector<uint64_t> counters() { return {emu::g.stats.mma, emu::g.stats.ldmatrix, emu::g.stats.ldmatrix_conflicts}; }

#else

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const char* const* name = cpu::supported_isas(); *name; name++) names.push_back(*name);
  return names;
}

void set_isa(const std::string& name) {
  std::string all;
  for (const std::string& isa : available_isas()) all += (all.empty() ? "" : ", ") + isa;
  check(cpu::set_isa(name.c_str()), "set_isa: name is \"", name, "\", expected one of: ", all);
}

void set_threads(int n) {
  check(n >= 1 && n <= kMaxThreads, "set_num_threads: n is ", n, ", expected 1 to ", kMaxThreads);
  set_num_threads(n);
}

#endif

// RuntimeError, saying what is wrong, unless this build has kernels that GPU `index` can run.
void check_gpu([[maybe_unused]] int index) {
#if defined(KIMI_CUDA)
  gpu::use_device(index);
#else
  throw std::runtime_error(
      "this build has no CUDA kernels; with nvcc installed: pip install -Ccmake.define.KIMI_CUDA=ON .");
#endif
}

}  // namespace

void register_runtime(nanobind::module_& m) {
  m.def("check_gpu", &check_gpu);
#if defined(KIMI_EMULATOR)
  m.def("configure", &configure, "order"_a, "seed"_a = 0, "multiprocessors"_a = 3, "shared_per_block"_a = 99 << 10,
        "compute_capability"_a = 90);
  m.def("counters", &counters);
#else
  m.def("isa", [] { return cpu::kernels().name; });
  m.def("available_isas", &available_isas);
  m.def("set_isa", &set_isa);
  nanobind::class_<Recording>(m, "Recording")
      .def(nanobind::init<>())
      .def_prop_ro("address", [](const Recording& r) { return reinterpret_cast<uintptr_t>(&r); })
      .def("replay", &Recording::replay);
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_threads);
#endif
}

}  // namespace kimi
