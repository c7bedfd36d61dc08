// The calls that ops on the CPU have made, to be made again without Python between them: what a CUDA graph is on the
// GPU. They read and write where they did the first time; whoever replays them keeps that memory.
#pragma once
#include <nanobind/nanobind.h>

#include <chrono>
#include <functional>
#include <vector>

#include "core/parallel.h"

namespace kimi {

class Recording {
 public:
  template <class Params, class Run>
  void add(const Params& p, const Run& run) {
    if constexpr (requires { p.weight, p.n_out, p.n_in; }) {  // a product: its weights are known before it is called
      int64_t matrices = 1;
      if constexpr (requires { p.N; }) matrices = p.N;
      for (; told_ < calls_.size(); told_++) {
        calls_[told_].next = p.weight;
        calls_[told_].next_bytes = matrices * p.n_out * p.n_in * int64_t(sizeof *p.weight);
      }
    }
    calls_.push_back({run});
  }

  void replay() const {
    nanobind::gil_scoped_release release;
    auto asked = std::chrono::steady_clock::now();
    for (const Call& call : calls_) {
      if (call.next) read_next(call.next, call.next_bytes);
      call.run();
      if (const auto now = std::chrono::steady_clock::now(); now - asked > kPatience) {
        nanobind::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals()) throw nanobind::python_error();
        asked = now;
      }
    }
  }

 private:
  static constexpr auto kPatience = std::chrono::milliseconds(100);  // of somebody who presses Ctrl-C

  struct Call {
    std::function<void()> run;
    const void* next = nullptr;  // weights that the first product after it reads
    int64_t next_bytes = 0;
  };
  std::vector<Call> calls_;
  size_t told_ = 0;  // calls that have such a product after them
};

}  // namespace kimi
