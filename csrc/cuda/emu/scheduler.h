// Which thread goes on, and how one waits or fails.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "cuda/emu/state.h"

namespace kimi::emu {

inline void land_bulk() {  // one of the bulk copies in flight lands
  if (g.config.order == Order::random) std::swap(g.bulk[g.random() % g.bulk.size()], g.bulk.back());
  auto copy = std::move(g.bulk.back());
  g.bulk.pop_back();
  copy();
}

inline Fiber& next_fiber() {
  Quiet q;
  while (!g.bulk.empty() && g.error.empty() &&
         (g.ready.empty() || (g.config.order == Order::random && g.random() % 4 == 0)))
    land_bulk();
  if (g.ready.empty() && g.alive && g.error.empty()) {
    g.error = "deadlock: no thread can go on;";
    int listed = 0;
    for (auto& t : g.threads)
      if (t->waits && listed++ < 4)
        g.error += " thread (" + std::to_string(t->tid.x) + "," + std::to_string(t->tid.y) + "," +
                   std::to_string(t->tid.z) + ") waits in " + t->waits + " at " + t->where.str() + ";";
  }
  if (!g.error.empty() || g.ready.empty()) return g.main;
  if (g.config.order == Order::random) std::swap(g.ready[g.random() % g.ready.size()], g.ready.back());
  g.cur = g.ready.back();
  g.ready.pop_back();
  ++g.stats.switches;
  return *g.cur;
}

inline void run_next() {
  Fiber& self = *g.cur;
  Fiber& next = next_fiber();
  if (&next != &self) switch_fiber(self, next, g.main);
}

// Stops the launch: run() throws. The fibers of the block are abandoned where they are.
[[noreturn]] inline void fail(const std::string& what) {
  Quiet q;
  Thread& t = *g.cur;
  g.error = what + " [block (" + std::to_string(g.index.x) + "," + std::to_string(g.index.y) + "," +
            std::to_string(g.index.z) + "), thread (" + std::to_string(t.tid.x) + "," + std::to_string(t.tid.y) + "," +
            std::to_string(t.tid.z) + ")]";
  run_next();
  std::abort();
}

inline void require(bool ok, const char* what, Site s) {
  if (!ok) fail(std::string(what) + " at " + s.str());
}

inline void wait(const char* name, Site s) {
  g.cur->waits = name, g.cur->where = s;
  run_next();
  g.cur->waits = nullptr;
}

// In random order, a thread may be held up where it need not wait, while others go on.
inline void perhaps_yield() {
  Quiet q;
  if (g.config.order != Order::random || g.random() % 4) return;
  g.ready.push_back(g.cur);
  run_next();
}

inline void wake(std::vector<Thread*>& list) {
  if (g.config.order != Order::random)  // ready is a stack: who is to run first comes last
    std::sort(list.begin(), list.end(), [](Thread* a, Thread* b) {
      const unsigned i = a->warp * 32 + a->lane, j = b->warp * 32 + b->lane;
      return g.config.order == Order::ascending ? i > j : i < j;
    });
  g.ready.insert(g.ready.end(), list.begin(), list.end());
  list.clear();
}

}  // namespace kimi::emu
