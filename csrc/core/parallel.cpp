#include "core/parallel.h"

#include <pthread.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "core/check.h"
#include "core/cpu_count.h"

namespace kimi {
namespace {

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Long enough to bridge the gap between two regions of one layer, a few small ops and the Python around them; short
// enough not to burn a shared core.
constexpr auto kSpin = std::chrono::microseconds(50);

template <class Ready, class Pause>
bool spin_until(Ready ready, Pause pause) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; i++) {
      if (ready()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return ready();
}

class Pool {
 public:
  void run(int64_t pieces, PieceFunction function, void* context) {
    std::unique_lock<std::mutex> owner(busy_, std::try_to_lock);
    const int helpers = owner.owns_lock() ? int(std::min<int64_t>(threads_.load(), pieces)) - 1 : 0;
    if (helpers < 1) {
      for (int64_t i = 0; i < pieces; i++) function(context, i);
      return;
    }
    while (int(workers_.size()) < helpers) {
      std::thread worker(&Pool::work, this, int(workers_.size()));
      workers_.push_back({worker.native_handle(), int(workers_.size()) + 1});
      if (has_all_cores()) keep_on_core(workers_.back().thread, workers_.back().core);
      worker.detach();
    }
    if (has_all_cores()) keep_apart();
    function_ = function, context_ = context;
    for (int64_t i = 0; i <= helpers; i++) {
      shares_[i].next.store(pieces * i / (helpers + 1), std::memory_order_relaxed);
      shares_[i].end = pieces * (i + 1) / (helpers + 1);
    }
    finished_.store(0, std::memory_order_relaxed);
    open(helpers);
    take_pieces(0);
    close();
  }

  void read_next(const void* memory, int64_t bytes) {
    next_bytes_.store(bytes, std::memory_order_relaxed);
    next_.store(static_cast<const char*>(memory), std::memory_order_release);
  }

  int threads() const { return threads_.load(); }
  void set_threads(int n) { threads_.store(n); }

 private:
  // state_ = epoch (high 15 bits) | open (bit 16) | joined (low 16 bits). A worker takes part only after it has raised
  // `joined` while the region was open, so close() never waits for a thread that the system has not scheduled yet.
  static constexpr uint32_t kOpen = 1u << 16, kEpoch = 1u << 17, kJoined = kOpen - 1;

  // Woken after a pause, a worker may be put on the caller's core and stay there for tens of milliseconds. So each has
  // a core of its own, and one whose core the caller has come to takes the caller's old one. Not where there are more
  // cores than threads: several processes would all choose the same ones.
  bool has_all_cores() const { return threads_.load() >= core_count(); }

  void keep_apart() {
    const int core = current_core();
    if (core < 0 || core == caller_core_) return;
    for (Worker& worker : workers_)
      if (worker.core == core) keep_on_core(worker.thread, worker.core = caller_core_);
    caller_core_ = core;
  }

  // What a waiting thread has asked for of its share of the memory that comes next.
  struct Ahead {
    const char *of = nullptr, *at = nullptr, *end = nullptr;
  };

  void pause(Ahead& ahead, int self) const {
    if (const char* next = next_.load(std::memory_order_acquire); next != ahead.of) {
      const int64_t share = next_bytes_.load(std::memory_order_relaxed) / threads_.load(std::memory_order_relaxed);
      ahead = {next, next + self * share, next + self * share + std::min(share, kAhead)};
    }
    if (ahead.at == ahead.end) return relax();
    __builtin_prefetch(ahead.at, 0, 2);
    ahead.at += std::min<int64_t>(64, ahead.end - ahead.at);
  }

  void open(int helpers) {
    helpers_.store(helpers, std::memory_order_relaxed);
    const uint32_t epoch = (state_.load(std::memory_order_relaxed) & ~(kOpen | kJoined)) + kEpoch;
    state_.store(epoch | kOpen, std::memory_order_release);
    state_.notify_all();
  }

  void close() {
    const uint32_t joined = state_.fetch_and(~kOpen, std::memory_order_acq_rel) & kJoined;
    uint32_t finished = 0;
    auto all_finished = [&] { return (finished = finished_.load(std::memory_order_acquire)) == joined; };
    while (!spin_until(all_finished, [&] { pause(ahead_, 0); })) finished_.wait(finished, std::memory_order_acquire);
  }

  bool join(uint32_t state) {
    return (state & kOpen) &&
           state_.compare_exchange_strong(state, state + 1, std::memory_order_acq_rel, std::memory_order_relaxed);
  }

  void work(int index) {
    uint32_t seen = 0;  // epoch this worker has dealt with
    Ahead ahead;
    for (;;) {
      uint32_t state = state_.load(std::memory_order_acquire);
      auto changed = [&] {
        state = state_.load(std::memory_order_acquire);
        return (state & kOpen) && (state & ~(kOpen | kJoined)) != seen;
      };
      if (!spin_until(changed, [&] { pause(ahead, index + 1); })) {
        state_.wait(state, std::memory_order_acquire);
        continue;
      }
      if (index >= helpers_.load(std::memory_order_relaxed)) {
        seen = state & ~(kOpen | kJoined);
        continue;
      }
      if (!join(state)) continue;
      seen = state & ~(kOpen | kJoined);
      take_pieces(index + 1);
      finished_.fetch_add(1, std::memory_order_release);
      finished_.notify_one();
    }
  }

  // Its own share from front to back, so that what a thread reads lies in a row, then what is left of the others'.
  void take_pieces(int self) {
    const int shares = helpers_.load(std::memory_order_relaxed) + 1;
    for (int i = 0; i < shares; i++) {
      Share& share = shares_[(self + i) % shares];
      while (share.next.load(std::memory_order_relaxed) < share.end) {
        const int64_t piece = share.next.fetch_add(1, std::memory_order_relaxed);
        if (piece < share.end) function_(context_, piece);
      }
    }
  }

  std::mutex busy_;
  std::atomic<int> threads_{default_threads()};
  struct Worker {
    pthread_t thread;
    int core;
  };
  std::vector<Worker> workers_;  // guarded by busy_, as are the next two lines
  int caller_core_ = 0;
  Ahead ahead_;                                 // the caller's
  static constexpr int64_t kAhead = 192 << 10;  // bytes; they are to stay in the L2 cache
  std::atomic<const char*> next_{nullptr};
  std::atomic<int64_t> next_bytes_{0};
  std::atomic<uint32_t> state_{0}, finished_{0};
  std::atomic<int> helpers_{0};
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  std::array<Share, kMaxThreads> shares_;  // the caller's, then the workers'
  PieceFunction function_ = nullptr;
  void* context_ = nullptr;

  static int default_threads() {
    const char* wanted = std::getenv("KIMI_NUM_THREADS");
    if (!wanted) return usable_cores();
    const int n = std::atoi(wanted);
    check(n >= 1 && n <= kMaxThreads, "KIMI_NUM_THREADS is \"", wanted, "\", expected 1 to ", kMaxThreads);
    return n;
  }
};

// Never destroyed: its detached workers may outlive static destructors. A forked child has no workers, so it starts a
// pool of its own and leaves the parent's alone.
Pool* pool_instance = nullptr;

Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool_instance = new Pool;
    pthread_atfork(nullptr, nullptr, [] {
      const int threads = pool_instance->threads();
      pool_instance = new Pool;
      pool_instance->set_threads(threads);
    });
  });
  return *pool_instance;
}

}  // namespace

int num_threads() { return pool().threads(); }
void set_num_threads(int n) { pool().set_threads(n); }
void read_next(const void* memory, int64_t bytes) { pool().read_next(memory, bytes); }

void run_pieces(int64_t pieces, PieceFunction function, void* context) {
  if (pieces == 1) return function(context, 0);
  if (pieces > 0) pool().run(pieces, function, context);
}

}  // namespace kimi
