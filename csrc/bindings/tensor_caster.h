// Array -> Tensor: NumPy by the buffer protocol, CuPy by DLPack. The only code that knows array libraries.
//
// Anything else becomes a Tensor of dtype Other that carries the type's name, so that the op can say what came. bf16
// has no buffer format: Python hands bf16 arrays over as uint16 views. The emulator's device memory is the host's:
// there NumPy arrays are the ones on the GPU.
#pragma once
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdio>

#include "bindings/dlpack.h"
#include "core/tensor.h"

namespace nb = nanobind;

NAMESPACE_BEGIN(NB_NAMESPACE)
NAMESPACE_BEGIN(detail)

template <>
struct type_caster<kimi::Tensor> {
  NB_TYPE_CASTER(kimi::Tensor, const_name("ArrayLike"))

#if defined(KIMI_EMULATOR)
  static constexpr kimi::Device kHost = kimi::Device::Cuda;
#else
  static constexpr kimi::Device kHost = kimi::Device::Cpu;
#endif

  bool from_python(handle src, uint8_t, cleanup_list*) noexcept {
    value = {};  // one caster serves all elements of a list
    value.device = kHost;
    if (!hasattr(src, "dtype") || !(from_buffer(src) || from_dlpack(src))) name_of(src);
    return true;
  }

 private:
  static kimi::DType dtype_of(char kind, int64_t itemsize) {
    if (kind == 'f' && itemsize == 4) return kimi::DType::F32;
    if (kind == 'u' && itemsize == 2) return kimi::DType::BF16;
    if (kind == 'i' && itemsize == 4) return kimi::DType::I32;
    if (kind == 'i' && itemsize == 8) return kimi::DType::I64;
    if (kind == 'i' && itemsize == 1) return kimi::DType::I8;
    return kimi::DType::Other;
  }

  static char kind_of(const char* format) {
    if (!format || format[0] == '\0' || format[1] != '\0') return '?';
    if (format[0] == 'f') return 'f';
    if (format[0] == 'H') return 'u';
    return format[0] == 'b' || format[0] == 'i' || format[0] == 'l' || format[0] == 'q' ? 'i' : '?';
  }

  static char kind_of(uint8_t code) {
    constexpr char kKinds[] = {'i', 'u', 'f', '?', 'u'};
    return code < sizeof kKinds ? kKinds[code] : '?';
  }

  // The dtype's name for an array, the type's name for anything else.
  void name_of(handle src) {
    const object held = hasattr(src, "dtype") ? object(src.attr("dtype")) : object(src.type().attr("__name__"));
    const str name(held);
    value.dtype = kimi::DType::Other;
    std::snprintf(value.type_name, sizeof value.type_name, "%s", name.c_str());
  }

  bool from_buffer(handle src) {
    Py_buffer view;
    if (PyObject_GetBuffer(src.ptr(), &view, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
      PyErr_Clear();
      return false;
    }
    value.data = view.buf;
    value.ndim = view.ndim;
    value.writable = !view.readonly;
    value.dtype = dtype_of(kind_of(view.format), view.itemsize);
    bool aligned = reinterpret_cast<uintptr_t>(view.buf) % uintptr_t(view.itemsize) == 0;
    for (int i = 0; i < view.ndim && i < kimi::kMaxDims; i++) {
      value.shape[i] = view.shape[i];
      value.stride[i] = view.strides[i] / view.itemsize;
      aligned = aligned && view.strides[i] % view.itemsize == 0;
    }
    PyBuffer_Release(&view);
    finish(src, aligned);
    return true;
  }

  // Names what is of no use to a kernel.
  void finish(handle src, bool aligned) {
    if (value.dtype == kimi::DType::Other) name_of(src);
    if (aligned) return;
    value.dtype = kimi::DType::Other;
    std::snprintf(value.type_name, sizeof value.type_name, "a misaligned array");
  }

  // stream=-1: no synchronisation here, the op runs on the stream it is given.
  bool from_dlpack(handle src) {
    if (!hasattr(src, "__dlpack__")) return false;
    try {
      const object capsule = src.attr("__dlpack__")(arg("stream") = -1);
      const auto* managed =
          static_cast<const kimi::dlpack::DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
      if (!managed) return PyErr_Clear(), false;
      from_dltensor(managed->tensor);
      const auto address = reinterpret_cast<uintptr_t>(value.data);
      finish(src, address % std::max<uintptr_t>(1, managed->tensor.dtype.bits / 8) == 0);
    } catch (python_error& e) {
      return false;
    }
    return true;
  }

  void from_dltensor(const kimi::dlpack::DLTensor& t) {
    value.data = static_cast<char*>(t.data) + t.byte_offset;
    value.ndim = t.ndim;
    value.writable = true;
    value.device = t.device.type == kimi::dlpack::kCuda ? kimi::Device::Cuda : kHost;
    value.device_index = value.device == kimi::Device::Cuda ? t.device.id : 0;
    value.dtype = t.dtype.lanes == 1 ? dtype_of(kind_of(t.dtype.code), t.dtype.bits / 8) : kimi::DType::Other;
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; i--) {
      if (i < kimi::kMaxDims) {
        value.shape[i] = t.shape[i];
        value.stride[i] = t.strides ? t.strides[i] : stride;
      }
      stride *= t.shape[i];
    }
  }
};

NAMESPACE_END(detail)
NAMESPACE_END(NB_NAMESPACE)
