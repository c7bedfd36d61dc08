// What sm_90a adds: mbarriers, bulk copies that arrive at them, instructions of a whole warpgroup.
#pragma once

#include <array>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/emu/cp_async.h"
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

// The arrival of a thread whose cp.async are in flight, and they, land like a bulk copy.
inline void mbarrier_arrive_after_copies(void* at, Site s) {
  Quiet q;
  Mbarrier& now = mbarrier_at(at, s);
  order_before(&now.order[now.phase & 1]);
  g.bulk.push_back([at, s, copies = std::move(g.cur->open)] {
    Quiet quiet;  // whoever runs this is not the one that copies
    for (const Copy& c : copies) land(c);
    Mbarrier& b = g.mbarriers.at(at);
    if (!b.pending) {
      g.error = "mbarrier: more arrivals than it counts at " + s.str();
      return;
    }
    --b.pending;
    mbarrier_settle(b);
  });
  g.cur->open.clear();
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

// ---- wgmma: done at once in descending order, only when it is waited for in ascending order, either in random order;
// its registers are read and written when it is done.
inline void wgmma_fence() {
  Quiet q;
  g.cur->fenced = true;
  for (Held& h : g.cur->held) std::memcpy(h.fenced, h.at, sizeof h.fenced);
}

inline void wgmma_wait(size_t allowed, Site s) {
  group_collective("wgmma.wait_group", nullptr, s, [allowed](Group& group) {
    for (; group.pending.size() > allowed; group.pending.pop_front())
      for (auto& f : group.pending.front()) f();
  });
  if (allowed == 0) g.cur->fenced = false, g.cur->held.clear();
}

inline void check_fenced(const unsigned (&a)[4], Site s) {
  Quiet q;
  require(g.cur->fenced, "wgmma: no wgmma.fence before it", s);
  for (const Held& h : g.cur->held)
    if (h.at == a) return require(!std::memcmp(h.fenced, a, sizeof a), "wgmma: operand written after wgmma.fence", s);
  g.cur->held.push_back({a, {a[0], a[1], a[2], a[3]}});
}

struct Fragments {  // what one thread gives a wgmma
  float* d;
  const unsigned* a;
  uintptr_t b;
};

template <int N>
void wgmma_compute(const std::array<Fragments, 128>& of) {
  static float A[64][16], B[16][N], D[64][N];
  const auto each_d = [&](auto f) {
    for (int i = 0; i < 128; ++i)
      for (int v = 0; v < N / 2; ++v)
        f(of[i].d[v], D[i / 32 * 16 + i % 32 / 4 + v % 4 / 2 * 8][v / 4 * 8 + i % 4 * 2 + v % 2]);
  };
  for (int i = 0; i < 128; ++i)
    for (int v = 0; v < 8; ++v)
      A[i / 32 * 16 + i % 32 / 4 + v / 2 % 2 * 8][v / 4 * 8 + i % 4 * 2 + v % 2] =
          to_float(bf16{uint16_t(of[i].a[v / 2] >> v % 2 * 16)});
  for (int n = 0; n < N; ++n)
    for (int k = 0; k < 16; ++k) {
      uintptr_t at = of[0].b + n * 128 + k * 2;
      at ^= (at >> 7 & 7) << 4;  // the 128-byte swizzle
      B[k][n] = to_float(*reinterpret_cast<const bf16*>(at));
    }
  each_d([](float& d, float& at) { at = d; });
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < N; ++n) D[m][n] += A[m][k] * B[k][n];
  each_d([](float& d, float& at) { d = at; });
}

template <int N>
void wgmma_m64k16(float (&d)[N / 2], const unsigned (&a)[4], uintptr_t b, Site s) {
  check_fenced(a, s);
  Fragments mine{d, a, b};
  group_collective("wgmma", &mine, s, [s](Group& group) {
    std::array<Fragments, 128> of;
    for (int i = 0; i < 128; ++i) of[i] = *static_cast<Fragments*>(group.operand[i]);
    for (const Fragments& f : of) require(f.b == of[0].b, "wgmma: threads name different tiles", s);
    const bool now = g.config.order == Order::descending ||
                     (g.config.order == Order::random && group.open.empty() && group.pending.empty() && g.random() % 2);
    if (now)
      wgmma_compute<N>(of);
    else
      group.open.push_back([of] { wgmma_compute<N>(of); });
  });
}

}  // namespace kimi::emu
