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

// A fiber is the thread of its index in one block after another.
inline void thread_main() {
  arrived(*g.cur, g.main);
  for (;;) {
    order_after(&g.started);
    g.call(g.arg);
    order_before(&g.ended);
    thread_ends(*g.cur);
    run_next();
  }
}

inline void run_block() {
  const unsigned n = g.block.x * g.block.y * g.block.z;
  // new ones, and not the old ones reset: by its address ThreadSanitizer would order this block after the one before
  g.warps = std::vector<Warp>((n + 31) / 32);
  g.barrier = std::vector<Rendezvous>(16);
  if (n % 32) g.warps.back().exited = ~0u << (n % 32);
  g.groups.assign(n / 128, Group{});
  g.mbarriers.clear();
  g.bulk.clear();
  g.alive = n;
  g.exited = 0;
  g.ready.clear();
#if defined(__SANITIZE_THREAD__)
  g.spare.push_back(std::move(g.threads));
  g.threads = std::move(g.spare.front());
  g.spare.pop_front();
#endif
  while (g.threads.size() < n) g.threads.push_back(std::make_unique<Thread>());
  std::vector<Thread*> all;
  for (unsigned i = 0; i < n; ++i) {
    Thread& t = *g.threads[i];
    t.open.clear();
    t.groups.clear();
    t.fenced = false;
    t.held.clear();
    t.tid = {i % g.block.x, i / g.block.x % g.block.y, i / g.block.x / g.block.y};
    t.lane = i % 32;
    t.warp = i / 32;
    if (!t.made) make_fiber(t, thread_main);
    t.made = true;
    all.push_back(&t);
  }
  wake(all);
  switch_fiber(g.main, next_fiber(), g.main);
  if (!g.error.empty())  // abandoned where they are
    for (auto& t : g.threads) {
      t->made = false;
      t->waits = nullptr;
    }
  free_shared();
}

template <class F>
void run(dim3 grid, dim3 block, size_t dynamic, F&& kernel) {
  Quiet q;
  const size_t n = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
  if (n == 0 || n > 1024 || block.z > 64) throw std::invalid_argument("emu: bad block size");
  if (blocks == 0 || grid.y > 65535 || grid.z > 65535) throw std::invalid_argument("emu: bad grid size");
  g.grid = grid;
  g.block = block;
  g.dynamic = dynamic;
  g.rng = g.config.seed;
  g.error.clear();
  g.call = [](void* f) { (*static_cast<std::remove_reference_t<F>*>(f))(); };
  g.arg = const_cast<void*>(static_cast<const void*>(&kernel));
#if defined(__SANITIZE_ADDRESS__)
  g.main.bottom = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  g.main.tsan = __tsan_get_current_fiber();
#endif
  order_before(&g.started);  // blocks of one launch are not ordered among each other
  std::vector<size_t> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = g.config.order == Order::descending ? blocks - 1 - i : i;
  if (g.config.order == Order::random)
    for (size_t i = blocks - 1; i > 0; --i) std::swap(order[i], order[g.random() % (i + 1)]);
  for (size_t i : order) {
    g.index = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    run_block();
    if (!g.error.empty()) throw std::runtime_error("emu: " + g.error);
  }
  order_after(&g.ended);
}

}  // namespace kimi::emu
