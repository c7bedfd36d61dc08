// cp.async: copies from global to shared memory that a thread has in flight.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "cuda/emu/shared.h"

namespace kimi::emu {

// A copy may land at any time between its issue and the wait that covers it. In ascending order all
// land at the wait, in descending order at once, in random order either.
inline void land(const Copy& c) {
  if (c.bytes) std::memcpy(c.dst, c.src, c.bytes);
  if (c.zeros) std::memset(static_cast<char*>(c.dst) + c.bytes, 0, c.zeros);
}

inline void copy_async(void* dst, const void* src, int size, int bytes, Site s) {
  Copy c{dst, src, bytes, size - bytes};
  bool now;
  {
    Quiet q;
    require(in_shared(dst, size), "cp.async: the destination is not in the block's shared memory", s);
    require(reinterpret_cast<uintptr_t>(dst) % size == 0, "cp.async: misaligned destination", s);
    require(bytes == 0 || reinterpret_cast<uintptr_t>(src) % size == 0, "cp.async: misaligned source", s);
    require(bytes >= 0 && bytes <= size, "cp.async: bad source size", s);
    now = g.config.order == Order::descending || (g.config.order == Order::random && g.random() % 2);
    if (!now) g.cur->open.push_back(c);
  }
  if (now) land(c);
  perhaps_yield();
}

inline void copy_commit() {
  Quiet q;
  g.cur->groups.push_back(std::move(g.cur->open));
  g.cur->open.clear();
}

inline void copy_wait(size_t allowed) {
  for (;;) {
    std::vector<Copy> group;
    {
      Quiet q;
      if (g.cur->groups.size() <= allowed) return;
      group = std::move(g.cur->groups.front());
      g.cur->groups.pop_front();
    }
    for (auto& c : group) land(c);
  }
}

}  // namespace kimi::emu
