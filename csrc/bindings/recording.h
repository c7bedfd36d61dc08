// The calls that ops on the CPU have made, to be made again without Python between them: what a CUDA graph is on the
// GPU. They read and write where they did the first time; whoever replays them keeps that memory.
#pragma once
#include <nanobind/nanobind.h>

#include <chrono>
#include <functional>
#include <vector>

namespace kimi {

class Recording {
 public:
  template <class Call>
  void add(const Call& call) {
    calls_.push_back(call);
  }

  void replay() const {
    nanobind::gil_scoped_release release;
    auto asked = std::chrono::steady_clock::now();
    for (const auto& call : calls_) {
      call();
      if (const auto now = std::chrono::steady_clock::now(); now - asked > kPatience) {
        nanobind::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals()) throw nanobind::python_error();
        asked = now;
      }
    }
  }

 private:
  static constexpr auto kPatience = std::chrono::milliseconds(100);  // of somebody who presses Ctrl-C

  std::vector<std::function<void()>> calls_;
};

}  // namespace kimi
