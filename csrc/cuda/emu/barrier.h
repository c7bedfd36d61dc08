// Barriers among the threads of a block and collectives among the lanes of a warp.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "cuda/emu/scheduler.h"

namespace kimi::emu {

inline void barrier(int id, unsigned need, bool wait_here, Site s, const char* name) {
  Rendezvous& b = g.barrier[id];
  char* at;
  {
    Quiet q;
    at = &b.order[b.phase & 1];
    order_before(at);
    if (b.arrived == 0) b.site = s, b.need = need;
    if (b.need != need)
      fail(std::string(name) + ": threads expect different counts at " + b.site.str() + " and " + s.str());
    if (++b.arrived < b.need) {
      if (wait_here) b.waiting.push_back(g.cur), wait(name, s);
    } else {
      b.arrived = 0, ++b.phase;
      wake(b.waiting);
      perhaps_yield();
    }
  }
  if (wait_here) order_after(at);
}

inline void sync_threads(Site s) {
  const unsigned total = g.block.x * g.block.y * g.block.z;
  if (g.exited) fail("__syncthreads at " + s.str() + " after a thread of the block has returned");
  if (g.barrier[0].arrived && !(g.barrier[0].site == s))
    fail("divergent __syncthreads: some threads at " + g.barrier[0].site.str() + ", others at " + s.str());
  barrier(0, total, true, s, "__syncthreads");
}

// The last lane of the mask to arrive runs fn(operands of all lanes, mask) for the whole group.
// Only __syncwarp orders memory: the exchange of values by a shuffle does not.
template <class F>
void collective(const char* name, unsigned mask, void* operand, Site s, F&& fn, bool orders = false) {
  Quiet q;
  Thread& t = *g.cur;
  Warp& w = g.warps[t.warp];
  if (!(mask >> t.lane & 1)) fail(std::string(name) + ": the calling lane is not in its own mask at " + s.str());
  if (mask & w.exited) fail(std::string(name) + ": the mask names lanes that do not run at " + s.str());
  Slot& c = w.slot[__builtin_ctz(mask)];
  if (!c.arrived) c.mask = mask, c.site = s, c.name = name;
  if (c.mask != mask || c.name != name || !(c.site == s))
    fail(std::string(name) + " at " + s.str() + ": other lanes are in " + c.name + " at " + c.site.str());
  char* at = &c.order[c.phase & 1];
  if (orders) order_before(at);
  c.arrived |= 1u << t.lane;
  c.operand[t.lane] = operand;
  if (c.arrived != mask) {
    wait(name, s);
  } else {
    fn(c.operand, mask);
    ++g.stats.collectives, ++c.phase;
    c.arrived = 0;
    static std::vector<Thread*> others;
    for (unsigned m = mask & ~(1u << t.lane); m; m &= m - 1)
      others.push_back(g.threads[t.warp * 32 + __builtin_ctz(m)].get());
    wake(others);
  }
  if (orders) order_after(at);
}

}  // namespace kimi::emu
