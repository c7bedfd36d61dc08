// A view of somebody else's array: pointer, shape, strides, dtype, place. Owns nothing.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace kimi {

constexpr int kMaxDims = 5;

enum class Device : uint8_t { Cpu, Cuda };

struct Tensor {
  void* data = nullptr;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements
  int ndim = 0;
  DType dtype = DType::Other;
  Device device = Device::Cpu;
  int device_index = 0;
  bool writable = false;
  char type_name[24] = "";  // what came, for messages, when dtype is Other
};

}  // namespace kimi
