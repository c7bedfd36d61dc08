// A stack of its own and the switch to it.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>

#include "cuda/emu/sanitizers.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace kimi::emu {

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

// Has the fiber start at `entry`, which never returns, when it is first switched to.
inline void make_fiber(Fiber& f, void (*entry)()) {
  if (!f.stack) {
    void* p =
        mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, kGuard, PROT_NONE)) throw std::bad_alloc();
    f.stack = static_cast<char*>(p) + kGuard;
  }
#if defined(__SANITIZE_THREAD__)
  f.tsan = __tsan_create_fiber(0);
  // another thread's stack from now on: forget who wrote to it
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  mmap(f.stack, kStack, PROT_READ | PROT_WRITE, kFlags, -1, 0);
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

inline void switch_fiber(Fiber& from, Fiber& to, Fiber& main) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.size);
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

}  // namespace kimi::emu
