// Checks the arguments of one op and hands out their pointers. A Dim is bound by the first argument that has it and
// compared from then on, so that a message can say which letter does not fit.
#pragma once
#include <climits>
#include <string>

#include "bindings/dispatch.h"
#include "bindings/tensor_caster.h"
#include "core/check.h"

namespace kimi {

struct Dim {
  std::string name;
  int64_t size = -1;  // -1 until bound

  operator int() const { return int(size); }
};

template <class T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, float>) return DType::F32;
  if constexpr (std::is_same_v<T, bf16>) return DType::BF16;
  if constexpr (std::is_same_v<T, int32_t>) return DType::I32;
  if constexpr (std::is_same_v<T, int64_t>) return DType::I64;
  if constexpr (std::is_same_v<T, int8_t>) return DType::I8;
}

inline const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "int32", "int64", "int8"};
  return kNames[int(dtype)];
}

class Args {
 public:
  Args(const char* op, Device device, int device_index = 0) : op_(op), device_(device), device_index_(device_index) {}
  Args(const char* op, const OnCpu&) : Args(op, Device::Cpu) {}
  Args(const char* op, const OnCuda& on) : Args(op, Device::Cuda, on.device_index) {}

  // C-contiguous array. T is const for inputs; otherwise the array must be writable.
  template <class T, class... Dims>
  T* dense(const char* name, const Tensor& t, Dims&... dims) const {
    T* data = strided<T>(name, t, dims...);
    int64_t expected = 1;
    for (int i = t.ndim - 1; i >= 0; i--) {
      check(t.shape[i] <= 1 || empty(t) || t.stride[i] == expected, op_, ": ", name, " is not contiguous");
      expected *= t.shape[i];
    }
    return data;
  }

  // Array whose last axis is contiguous; the other axes may be strided.
  template <class T, class... Dims>
  T* strided(const char* name, const Tensor& t, Dims&... dims) const {
    T* data = placed<T>(name, t, dims...);
    const int last = t.ndim - 1;
    check(t.shape[last] <= 1 || empty(t) || t.stride[last] == 1, op_, ": the last axis of ", name,
          " is not contiguous");
    return data;
  }

  // Array with any strides.
  template <class T, class... Dims>
  T* placed(const char* name, const Tensor& t, Dims&... dims) const {
    check_dtype(name, t, dtype_of<std::remove_const_t<T>>());
    check_shape(name, t, {&dims...});
    check(std::is_const_v<T> || t.writable, op_, ": ", name, " is read-only");
    return static_cast<T*>(t.data);
  }

  void check_dtype(const char* name, const Tensor& t, DType expected) const {
    check_type(t.dtype == expected, op_, ": ", name, " is ", type_of(t), ", expected a ", library(device_),
               " array of ", name_of(expected));
    check_place(name, t.device, t.device_index);
  }

  // All arrays of a call live in one place, that of the first.
  void check_place(const char* name, Device device, int index) const {
    check_type(device == device_, op_, ": ", name, " is a ", library(device), " array, expected a ", library(device_),
               " array like the first argument");
    check(index == device_index_, op_, ": ", name, " is on GPU ", index, ", expected GPU ", device_index_);
  }

  const char* op() const { return op_; }
  static const char* library(Device device) { return device == Device::Cpu ? "NumPy" : "CuPy"; }
  static const char* type_of(const Tensor& t) { return t.dtype == DType::Other ? t.type_name : name_of(t.dtype); }

  // An output must not share memory with an input that is read after the output is begun.
  void check_apart(const char* out_name, const Tensor& out, const char* name, const Tensor& in) const {
    const auto [a, a_end] = extent(out);
    const auto [b, b_end] = extent(in);
    check(a_end <= b || b_end <= a, op_, ": ", out_name, " overlaps ", name);
  }

  template <class... Parts>
  void require(bool condition, const Parts&... parts) const {
    check(condition, op_, ": ", parts...);
  }

 private:
  const char* op_;
  Device device_;
  int device_index_;

  static bool empty(const Tensor& t) {
    for (int i = 0; i < t.ndim; i++)
      if (t.shape[i] == 0) return true;
    return false;
  }

  // First byte and one past the last byte that the array touches.
  static std::pair<const char*, const char*> extent(const Tensor& t) {
    constexpr int kSizes[] = {4, 2, 4, 8, 1};
    const char *first = static_cast<const char*>(t.data), *last = first;
    if (empty(t)) return {first, first};
    for (int i = 0; i < t.ndim; i++) {
      const int64_t reach = (t.shape[i] - 1) * t.stride[i] * kSizes[int(t.dtype)];
      (reach < 0 ? first : last) += reach;
    }
    return {first, last + kSizes[int(t.dtype)]};
  }

  void check_shape(const char* name, const Tensor& t, std::initializer_list<Dim*> dims) const {
    bool fits = t.ndim == int(dims.size());
    int i = 0;
    for (Dim* d : dims) {
      if (!fits) break;
      fits = (d->size < 0 || d->size == t.shape[i]) && t.shape[i] <= INT_MAX;
      i++;
    }
    check(fits, op_, ": ", name, " has shape ", shape_text(t), ", expected ", expected_text(dims));
    i = 0;
    for (Dim* d : dims) d->size = t.shape[i++];
  }

  static std::string shape_text(const Tensor& t) {
    std::string text = "[";
    for (int i = 0; i < t.ndim && i < kMaxDims; i++) text += (i ? ", " : "") + std::to_string(t.shape[i]);
    return text + "]";
  }

  // "[T, H] with H = 7168"
  static std::string expected_text(std::initializer_list<Dim*> dims) {
    std::string shape, bound;
    for (const Dim* d : dims) {
      shape += (shape.empty() ? "" : ", ") + d->name;
      if (d->size >= 0) bound += (bound.empty() ? " with " : ", ") + d->name + " = " + std::to_string(d->size);
    }
    return "[" + shape + "]" + bound;
  }
};

// Offsets of E groups of consecutive rows, of M.
inline void check_offsets(const Args& a, const int32_t* offsets, int E, int M) {
  a.require(offsets[0] == 0, "offsets[0] is ", offsets[0], ", expected 0");
  for (int e = 0; e < E; e++)
    a.require(offsets[e] <= offsets[e + 1], "offsets falls from ", offsets[e], " to ", offsets[e + 1]);
  a.require(offsets[E] <= M, "offsets ends at ", offsets[E], ", expected at most M = ", M);
}

}  // namespace kimi
