// Runs the blocks of a launch, one after another.
#pragma once

#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/emu/scheduler.h"
#include "cuda/emu/shared.h"

namespace kimi::emu {

inline void thread_ends(Thread& t) {
  Quiet q;
  for (auto& group : t.groups)
    if (!group.empty()) fail("the kernel returned with cp.async copies in flight");
  if (!t.open.empty()) fail("the kernel returned with cp.async copies not committed");
  --g.alive, ++g.exited;
  if (!g.alive && !g.bulk.empty()) fail("the block ended with bulk copies in flight");
  if (g.barrier[0].arrived) fail("a thread returned while others wait in __syncthreads at " + g.barrier[0].site.str());
  g.warps[t.warp].exited |= 1u << t.lane;
  for (auto& c : g.warps[t.warp].slot)
    if (c.arrived && (c.mask >> t.lane & 1))
      fail(std::string("a lane returned while others of its mask wait in ") + c.name + " at " + c.site.str());
}

inline void thread_main() {
  arrived(*g.cur, g.main);
  order_after(&g.started);
  g.call(g.arg);
  order_before(&g.ended);
  thread_ends(*g.cur);
  run_next(true);
  std::abort();
}

inline void run_block() {
  const unsigned n = g.block.x * g.block.y * g.block.z;
  g.warps.assign((n + 31) / 32, Warp{});
  if (n % 32) g.warps.back().exited = ~0u << (n % 32);
  g.groups.assign(n / 128, Group{});
  for (auto& b : g.barrier) b.arrived = 0, b.waiting.clear();
  g.mbarriers.clear(), g.bulk.clear();
  g.alive = n, g.exited = 0, g.error.clear(), g.ready.clear();
  while (g.threads.size() < n) g.threads.push_back(std::make_unique<Thread>());
  std::vector<Thread*> all;
  for (unsigned i = 0; i < g.threads.size(); ++i) {
    Thread& t = *g.threads[i];
    t.waits = nullptr, t.open.clear(), t.groups.clear(), t.fenced = false, t.held.clear();
    if (i >= n) continue;
    t.tid = {i % g.block.x, i / g.block.x % g.block.y, i / g.block.x / g.block.y};
    t.lane = i % 32, t.warp = i / 32;
    make_fiber(t, thread_main);
    all.push_back(&t);
  }
  wake(all);
  switch_fiber(g.main, next_fiber(), g.main);
  free_shared();
}

template <class F>
void run(dim3 grid, dim3 block, size_t dynamic, F&& kernel) {
  Quiet q;
  const size_t n = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
  if (n == 0 || n > 1024 || block.z > 64) throw std::invalid_argument("emu: bad block size");
  if (blocks == 0 || grid.y > 65535 || grid.z > 65535) throw std::invalid_argument("emu: bad grid size");
  g.grid = grid, g.block = block, g.dynamic = dynamic, g.rng = g.config.seed;
  g.call = [](void* f) { (*static_cast<std::remove_reference_t<F>*>(f))(); };
  g.arg = const_cast<void*>(static_cast<const void*>(&kernel));
#if defined(__SANITIZE_ADDRESS__)
  g.main.bottom = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  g.main.tsan = __tsan_get_current_fiber();
  for (; !spent_fibers().empty(); spent_fibers().pop_front()) __tsan_destroy_fiber(spent_fibers().front());
#endif
  order_before(&g.started);  // blocks of one launch are not ordered among each other
  std::vector<size_t> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = g.config.order == Order::descending ? blocks - 1 - i : i;
  if (g.config.order == Order::random)
    for (size_t i = blocks - 1; i > 0; --i) std::swap(order[i], order[g.random() % (i + 1)]);
  for (size_t i : order) {
    g.index = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    run_block();
    if (!g.error.empty()) {
#if defined(__SANITIZE_THREAD__)
      for (auto& t : g.threads) t->tsan = nullptr;  // abandoned mid-way: cannot be destroyed
#endif
      throw std::runtime_error("emu: " + g.error);
    }
  }
  order_after(&g.ended);
}

}  // namespace kimi::emu
