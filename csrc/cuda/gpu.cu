#include "cuda/gpu.h"

#include <map>
#include <string>

namespace kimi::gpu {

#if defined(__CUDACC__)

namespace {

DeviceFacts ask(int index) {
  DeviceFacts facts{};
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index), "device");
    return value;
  };
  facts.compute_capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  facts.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  facts.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  facts.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return facts;
}

}  // namespace

const DeviceFacts& device() {
  static thread_local std::map<int, DeviceFacts> known;
  int index = 0;
  check(cudaGetDevice(&index), "device");
  const auto found = known.find(index);
  return found != known.end() ? found->second : known.emplace(index, ask(index)).first->second;
}

namespace {
void select(int index) { check(cudaSetDevice(index), "device"); }
}  // namespace

void zero(void* data, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)), "memset");
}

#else

const DeviceFacts& device() { return emu::g.config.device; }
namespace {
void select(int) {}
}  // namespace

void zero(void* data, size_t bytes, Stream) { std::memset(data, 0, bytes); }

#endif

void use_device(int index) {
  select(index);
  const int capability = device().compute_capability;
  if (capability < 80)
    throw Error("GPU " + std::to_string(index) + " has compute capability " + std::to_string(capability / 10) + "." +
                std::to_string(capability % 10) + ", expected 8.0 or higher");
}

}  // namespace kimi::gpu
