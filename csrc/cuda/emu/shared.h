// Shared memory: new for each block, full of NaN, aligned to what the kernel asks for and to no more.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/emu/scheduler.h"

namespace kimi::emu {

constexpr size_t kRed = 4096;  // red zone on each side

inline char* allocate_shared(const void* key, size_t bytes, size_t align) {
  Quiet q;
  size_t used = bytes;
  for (auto& s : g.shared) {
    if (s.key == key) return s.data;
    used += s.bytes;
  }
  if (used > size_t(g.config.device.shared_per_block))
    fail("the block has " + std::to_string(used) + " bytes of shared memory, more than the target allows");
  Shared s{key, bytes, std::make_unique<char[]>(bytes + 2 * kRed + 2 * align), nullptr};
  char* p = s.memory.get() + kRed;
  p += (align - reinterpret_cast<uintptr_t>(p) % (2 * align) + 2 * align) %
       (2 * align);  // aligned to align and to no more
  s.data = p;
  std::memset(p, 0xff, bytes);  // NaN in every float type
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(s.memory.get(), p - s.memory.get());
  __asan_poison_memory_region(p + bytes, s.memory.get() + bytes + 2 * kRed + 2 * align - (p + bytes));
#endif
  g.shared.push_back(std::move(s));
  return p;
}

inline void free_shared() {
#if defined(__SANITIZE_ADDRESS__)
  for (auto& s : g.shared) __asan_unpoison_memory_region(s.data - kRed, s.bytes + 2 * kRed);
#endif
  g.shared.clear();
}

template <class T>
T& shared_variable(const void* key) {
  static_assert(std::is_trivially_destructible_v<T>);
  return *reinterpret_cast<T*>(allocate_shared(key, sizeof(T), std::max<size_t>(alignof(T), 16)));
}

inline bool in_shared(const void* p, size_t n) {
  auto* c = static_cast<const char*>(p);
  for (auto& s : g.shared)
    if (c >= s.data && c + n <= s.data + s.bytes) return true;
  return false;
}

}  // namespace kimi::emu
