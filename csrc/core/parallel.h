// parallel_for over a small pool of threads: workers spin briefly, then sleep.
//
// Pieces depend on n and grain alone, so the number of threads never changes a result. A region entered while another
// one runs (from a second Python thread, or nested) is worked off by its caller alone.
#pragma once
#include <algorithm>
#include <cstdint>

namespace kimi {

int num_threads();
void set_num_threads(int n);  // 1 <= n <= kMaxThreads
constexpr int kMaxThreads = 1024;

// What a region that comes soon is going to read: a thread that waits asks for the beginning of its share meanwhile.
void read_next(const void* memory, int64_t bytes);

using PieceFunction = void (*)(void* context, int64_t piece);
void run_pieces(int64_t pieces, PieceFunction function, void* context);

// Calls body(begin, end) for consecutive ranges of at most `grain` that cover [0, n).
template <class Body>
void parallel_for(int64_t n, int64_t grain, Body&& body) {
  struct Context {
    Body& body;
    int64_t n, grain;
  } context{body, n, grain};
  auto function = [](void* opaque, int64_t piece) {
    auto& c = *static_cast<Context*>(opaque);
    c.body(piece * c.grain, std::min(c.n, (piece + 1) * c.grain));
  };
  run_pieces((n + grain - 1) / grain, function, &context);
}

}  // namespace kimi
