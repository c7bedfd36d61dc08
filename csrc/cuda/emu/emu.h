// Runs CUDA C++ kernels on the host, for tests on machines without a GPU.
//
// Every CUDA thread is a fiber. One fiber runs at a time, until it waits at a barrier or a warp
// collective, exits, or fails a check; then the scheduler picks the next one, in ascending,
// descending or seeded random order. So a kernel whose result depends on an ordering that CUDA
// does not promise gives different results under different seeds. Blocks run one after another.
//
// Built with -fsanitize=address, shared-memory arrays have red zones and fresh contents are NaN;
// built with -fsanitize=thread, only barriers order threads, so missing ones are reported as races.
#pragma once

#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <sys/mman.h>

#include "core/dtype.h"
#include "cuda/gpu.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// The vector types of CUDA that kernels and launches name.
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};
#define KIMI_VECTOR(type, name)                            \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; }; \
  struct alignas(16) name##4 { type x, y, z, w; };
KIMI_VECTOR(float, float)
KIMI_VECTOR(int, int)
KIMI_VECTOR(unsigned, uint)
#undef KIMI_VECTOR

namespace kimi::emu {

// ---- where a kernel waits, for messages and for checking that threads agree --------------------
struct Site {
  const char* file;
  int line;
  bool operator==(const Site& o) const { return line == o.line && (file == o.file || !std::strcmp(file, o.file)); }
  std::string str() const { return std::string(file ? file : "?") + ":" + std::to_string(line); }
};
// As the last parameters of a function: where it is called from.
#define EMU_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMU_HERE (::kimi::emu::Site{file, line})

// ---- sanitizers --------------------------------------------------------------------------------
// Hides the emulator's own memory traffic from ThreadSanitizer: what remains is the kernel's.
struct Quiet {
#if defined(__SANITIZE_THREAD__)
  Quiet() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Quiet() { AnnotateIgnoreReadsEnd("", 0), AnnotateIgnoreWritesEnd("", 0); }
#else
  Quiet() {}
#endif
};
inline void order_before([[maybe_unused]] void* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(at);
#endif
}
inline void order_after([[maybe_unused]] void* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(at);
#endif
}

// ---- fibers ------------------------------------------------------------------------------------
constexpr size_t kStack = 256 << 10, kGuard = 4096;

struct Fiber {
  char* stack = nullptr;  // null for the fiber that called run()
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t ctx;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif
};

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer of one fiber, and restores another's.
__attribute__((naked, noinline, no_sanitize_address, no_sanitize_thread, no_sanitize_undefined)) inline void
swap_stacks(void** /*save*/, void* /*load*/) {
  asm volatile(
      "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
}
#endif

#if defined(__SANITIZE_THREAD__)
inline std::deque<void*>& spent_fibers() {
  static std::deque<void*> all;
  return all;
}
#endif

inline void make_fiber(Fiber& f, void (*entry)()) {
  if (!f.stack) {
    void* p =
        mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, kGuard, PROT_NONE)) throw std::bad_alloc();
    f.stack = static_cast<char*>(p) + kGuard;
  }
#if defined(__SANITIZE_THREAD__)
  // A thread of another block is another thread. ThreadSanitizer takes one that it is told has ended for
  // its successor, so they are kept to the end of the launch, as far as its limit of 8128 allows.
  if (f.tsan) spent_fibers().push_back(f.tsan);
  if (spent_fibers().size() > 4096) __tsan_destroy_fiber(spent_fibers().front()), spent_fibers().pop_front();
  f.tsan = __tsan_create_fiber(0);
  constexpr size_t used = 64 << 10;  // and has another stack: forget who wrote to this one
  mmap(f.stack + kStack - used, used, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
       -1, 0);
#endif
#if defined(__SANITIZE_ADDRESS__)
  f.bottom = f.stack, f.size = kStack, f.fake = nullptr;
  __asan_unpoison_memory_region(f.stack, kStack);
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(f.stack + kStack) - 1;  // return address of entry: none
  *top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.sp = top;
#else
  getcontext(&f.ctx);
  f.ctx.uc_stack.ss_sp = f.stack, f.ctx.uc_stack.ss_size = kStack, f.ctx.uc_link = nullptr;
  makecontext(&f.ctx, entry, 0);
#endif
}

// Called first thing on arriving in a fiber; the first one a launch enters learns its caller's stack.
inline void arrived([[maybe_unused]] Fiber& self, [[maybe_unused]] Fiber& main) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(self.fake, &bottom, &size);
  if (!main.bottom) main.bottom = bottom, main.size = size;
#endif
}

inline void switch_fiber(Fiber& from, Fiber& to, Fiber& main, [[maybe_unused]] bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake, to.bottom, to.size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  swap_stacks(&from.sp, to.sp);
#else
  swapcontext(&from.ctx, &to.ctx);
#endif
  arrived(from, main);
}

// ---- the state of a launch ---------------------------------------------------------------------
struct Copy {  // one cp.async
  void* dst;
  const void* src;
  int bytes, zeros;
};

struct Thread : Fiber {
  uint3 tid;
  unsigned lane, warp;
  Site where;  // of the barrier or collective it waits at
  const char* waits = nullptr;
  std::vector<Copy> open;                // issued, not yet committed
  std::deque<std::vector<Copy>> groups;  // committed, perhaps not yet done
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
  Rendezvous barrier[16];
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
  char started, ended, fence;  // what ThreadSanitizer orders by

  uint64_t random() {  // splitmix64
    uint64_t z = (rng += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
};
inline State& g = *new State;  // outlives every abandoned fiber

// ---- scheduling --------------------------------------------------------------------------------
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

inline void run_next(bool last = false) {
  Fiber& self = *g.cur;
  Fiber& next = next_fiber();
  if (&next != &self) switch_fiber(self, next, g.main, last);
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

// ---- barriers ----------------------------------------------------------------------------------
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

// ---- warp collectives --------------------------------------------------------------------------
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

// ---- shared memory -----------------------------------------------------------------------------
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

// ---- launch ------------------------------------------------------------------------------------
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
    t.waits = nullptr, t.open.clear(), t.groups.clear();
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

// ---- cp.async ----------------------------------------------------------------------------------
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

// ---- mbarrier, bulk copies, warpgroups ---------------------------------------------------------
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
