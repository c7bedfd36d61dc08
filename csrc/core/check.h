// check(condition, parts...): throws with a readable message. Used in bindings only; kernels assume what was checked.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace kimi {

// Wrong dtype or kind of array; becomes Python's TypeError. std::invalid_argument becomes ValueError.
struct TypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream s;
  (s << ... << parts);
  return s.str();
}

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) throw std::invalid_argument(message(parts...));
}

template <class... Parts>
void check_type(bool condition, const Parts&... parts) {
  if (!condition) throw TypeError(message(parts...));
}

}  // namespace kimi
