#pragma once
#include <nanobind/nanobind.h>

namespace kimi {

// m.def, with None let through to the op's own checks, whose message names the argument.
template <class Result, class... Arguments>
void define(nanobind::module_& m, const char* name, Result (*function)(Arguments...)) {
  m.def(name, function, (static_cast<void>(sizeof(Arguments)), nanobind::arg().none())...);
}

void register_norm(nanobind::module_& m);
void register_linear(nanobind::module_& m);
void register_attention(nanobind::module_& m);
void register_moe(nanobind::module_& m);
void register_sampling(nanobind::module_& m);
void register_runtime(nanobind::module_& m);

}  // namespace kimi
