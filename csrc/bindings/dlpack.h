// The part of DLPack's ABI that is read here: https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once
#include <cstdint>

namespace kimi::dlpack {

constexpr int32_t kCpu = 1, kCuda = 2;
constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4;

struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null when contiguous
  uint64_t byte_offset;
};

struct DLManagedTensor {  // what a capsule named "dltensor" points to; the capsule deletes it
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

}  // namespace kimi::dlpack
