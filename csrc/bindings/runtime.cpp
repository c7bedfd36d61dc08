#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/register.h"
#include "core/check.h"
#include "core/parallel.h"
#include "cpu/kernels.h"

namespace kimi {
namespace {

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

}  // namespace

void register_runtime(nanobind::module_& m) {
  m.def("isa", [] { return cpu::kernels().name; });
  m.def("available_isas", &available_isas);
  m.def("set_isa", &set_isa);
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_threads);
}

}  // namespace kimi
