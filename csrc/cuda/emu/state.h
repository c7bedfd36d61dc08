// What a launch consists of while it runs: threads, what they wait in, shared memory, and how to schedule them.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda/emu/fiber.h"
#include "cuda/emu/site.h"
#include "cuda/emu/vector_types.h"
#include "cuda/gpu.h"

namespace kimi::emu {

struct Copy {  // one cp.async
  void* dst;
  const void* src;
  int bytes, zeros;
};

struct Held {  // registers that are an operand of wgmma, and what they held at the last wgmma.fence
  const unsigned* at;
  unsigned fenced[4];
};

struct Thread : Fiber {
  bool made = false;  // it is a fiber that waits for its next block
  uint3 tid;
  unsigned lane, warp;
  Site where;  // of the barrier or collective it waits at
  const char* waits = nullptr;
  std::vector<Copy> open;                // issued, not yet committed
  std::deque<std::vector<Copy>> groups;  // committed, perhaps not yet done
  bool fenced = false;                   // a wgmma.fence since it last waited for all wgmma
  std::vector<Held> held;                // operands of wgmma since then
};

struct Rendezvous {  // threads that wait for each other
  Site site{};
  unsigned arrived = 0, need = 0, phase = 0;
  char order[2];  // by phase, so that running ahead to the next phase orders nothing in this one
  std::vector<Thread*> waiting;
};

struct Slot {  // lanes of a warp at one collective
  unsigned mask = 0, arrived = 0, phase = 0;
  char order[2];
  Site site{};
  const char* name = nullptr;
  void* operand[32];
};

struct Warp {
  unsigned exited = 0;
  Slot slot[32];  // by lowest lane of the mask: disjoint groups of lanes can meet at once
};

struct Mbarrier {
  unsigned count, pending, phase = 0;
  long bytes = 0;  // that bulk copies have yet to bring
  char order[2];
  std::vector<Thread*> waiting;
};

struct Group {  // the 128 threads of a warpgroup at one instruction, and its wgmma not yet waited for
  unsigned arrived = 0;
  Site site{};
  const char* name = nullptr;
  void* operand[128];
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> pending;
};

struct Shared {  // one shared-memory array
  const void* key;
  size_t bytes;
  std::unique_ptr<char[]> memory;
  char* data;
};

enum class Order { ascending, descending, random };

struct Config {
  Order order = Order::ascending;
  uint64_t seed = 0;
  // Few multiprocessors, so that persistent kernels take more than one turn; the shared memory of sm_120, the least.
  gpu::DeviceFacts device{90, 3, 99 << 10, 100 << 10};
};

struct Stats {
  uint64_t switches = 0, collectives = 0, mma = 0, ldmatrix = 0, ldmatrix_conflicts = 0;
};

struct State {
  Config config;
  Stats stats;
  Fiber main;
  Thread* cur = nullptr;
  dim3 grid, block, index;
  std::vector<Thread*> ready;
  std::vector<Warp> warps;
  std::vector<Group> groups;
  std::vector<Rendezvous> barrier;
  std::map<const void*, Mbarrier> mbarriers;
  std::vector<std::function<void()>> bulk;  // copies in flight that no thread carries out
  std::vector<Shared> shared;
  size_t dynamic = 0;
  unsigned alive = 0, exited = 0;
  void (*call)(void*) = nullptr;
  void* arg = nullptr;
  std::string error;
  uint64_t rng = 1;
  std::vector<std::unique_ptr<Thread>> threads;
#if defined(__SANITIZE_THREAD__)
  // The threads of the blocks before: those of a block must not be ordered by having been those of its neighbour.
  std::deque<std::vector<std::unique_ptr<Thread>>> spare{3};
#endif
  char started, ended, fence;  // what ThreadSanitizer orders by

  uint64_t random() {  // splitmix64
    uint64_t z = (rng += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
};

inline State& g = *new State;  // outlives every abandoned fiber

}  // namespace kimi::emu
