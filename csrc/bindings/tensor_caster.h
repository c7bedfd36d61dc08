// NumPy array -> Tensor, by the buffer protocol. The only code that knows array libraries.
//
// Anything else becomes a Tensor of dtype Other that carries the type's name, so that the op can say what came. bf16
// has no buffer format: Python hands bf16 arrays over as uint16 views.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdio>

#include "core/tensor.h"

namespace nb = nanobind;

NAMESPACE_BEGIN(NB_NAMESPACE)
NAMESPACE_BEGIN(detail)

template <>
struct type_caster<kimi::Tensor> {
  NB_TYPE_CASTER(kimi::Tensor, const_name("ArrayLike"))

  static kimi::DType dtype_of(const char* format, Py_ssize_t itemsize) {
    if (!format || format[0] == '\0' || format[1] != '\0') return kimi::DType::Other;
    if (format[0] == 'f') return kimi::DType::F32;
    if (format[0] == 'H') return kimi::DType::BF16;
    const bool is_signed = format[0] == 'i' || format[0] == 'l' || format[0] == 'q';
    if (is_signed && itemsize == 4) return kimi::DType::I32;
    if (is_signed && itemsize == 8) return kimi::DType::I64;
    return kimi::DType::Other;
  }

  // The dtype's name for an array, the type's name for anything else.
  void name_of(handle src) {
    const object held = hasattr(src, "dtype") ? object(src.attr("dtype")) : object(src.type().attr("__name__"));
    const str name(held);
    std::snprintf(value.type_name, sizeof value.type_name, "%s", name.c_str());
  }

  bool from_python(handle src, uint8_t, cleanup_list*) noexcept {
    value = {};  // one caster serves all elements of a list
    Py_buffer view;
    if (!hasattr(src, "dtype") || PyObject_GetBuffer(src.ptr(), &view, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
      PyErr_Clear();
      name_of(src);
      return true;
    }
    value.data = view.buf;
    value.ndim = view.ndim;
    value.writable = !view.readonly;
    value.dtype = dtype_of(view.format, view.itemsize);
    bool aligned = reinterpret_cast<uintptr_t>(view.buf) % uintptr_t(view.itemsize) == 0;
    for (int i = 0; i < view.ndim && i < kimi::kMaxDims; i++) {
      value.shape[i] = view.shape[i];
      value.stride[i] = view.strides[i] / view.itemsize;
      aligned = aligned && view.strides[i] % view.itemsize == 0;
    }
    if (value.dtype == kimi::DType::Other) name_of(src);
    if (!aligned) {
      value.dtype = kimi::DType::Other;
      std::snprintf(value.type_name, sizeof value.type_name, "a misaligned array");
    }
    PyBuffer_Release(&view);
    return true;
  }
};

NAMESPACE_END(detail)
NAMESPACE_END(NB_NAMESPACE)
