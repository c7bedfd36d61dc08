// What sm_90a adds: mbarriers, bulk copies that arrive at them, instructions of a whole warpgroup.
#pragma once

#include <array>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/emu/scheduler.h"
#include "cuda/emu/shared.h"

namespace kimi::emu {

inline Mbarrier& mbarrier_at(const void* at, Site s) {
  auto it = g.mbarriers.find(at);
  if (it == g.mbarriers.end()) fail("mbarrier used before it is initialised at " + s.str());
  return it->second;
}

inline void mbarrier_init(void* at, unsigned count, Site s) {
  Quiet q;
  require(in_shared(at, 8), "mbarrier: not in the block's shared memory", s);
  g.mbarriers[at].count = g.mbarriers[at].pending = count;
}

inline void mbarrier_settle(Mbarrier& b) {
  if (b.pending || b.bytes) return;
  b.pending = b.count, ++b.phase;
  wake(b.waiting);
}

inline void mbarrier_arrive(void* at, long bytes, Site s) {
  Quiet q;
  Mbarrier& b = mbarrier_at(at, s);
  require(b.pending > 0, "mbarrier: more arrivals than it counts", s);
  order_before(&b.order[b.phase & 1]);
  b.bytes += bytes, --b.pending;
  mbarrier_settle(b);
  perhaps_yield();
}

inline void mbarrier_wait(void* at, unsigned parity, Site s) {
  Quiet q;
  Mbarrier& b = mbarrier_at(at, s);
  while ((b.phase & 1) == parity) b.waiting.push_back(g.cur), wait("mbarrier.wait", s);
  order_after(&b.order[parity]);
}

// Copies in flight until the scheduler lands them: last of all in ascending order, at once in descending.
inline void bulk_copy(std::function<void()> copy, void* at, long bytes, Site s) {
  Quiet q;
  mbarrier_at(at, s);
  g.bulk.push_back([=] {
    copy();
    Mbarrier& b = g.mbarriers.at(at);
    b.bytes -= bytes;
    mbarrier_settle(b);
  });
  if (g.config.order == Order::descending) land_bulk();
}

template <class F>
void group_collective(const char* name, void* operand, Site s, F&& fn) {
  Quiet q;
  const unsigned group = g.cur->warp / 4;
  require(group < g.groups.size(), "wgmma: the warp is not of a whole warpgroup", s);
  Group& c = g.groups[group];
  if (!c.arrived) c.name = name, c.site = s;
  if (c.name != name || !(c.site == s))
    fail(std::string(name) + " at " + s.str() + ": other warps of the group are in " + c.name + " at " + c.site.str());
  c.operand[g.cur->warp % 4 * 32 + g.cur->lane] = operand;
  if (++c.arrived < 128) return wait(name, s);
  fn(c);
  c.arrived = 0;
  std::vector<Thread*> others;
  for (unsigned i = 0; i < 128; ++i)
    if (Thread* t = g.threads[128 * group + i].get(); t != g.cur) others.push_back(t);
  wake(others);
}

}  // namespace kimi::emu
