#pragma once
#include <pthread.h>

namespace kimi {

// Physical cores in this process's affinity mask, at least 1.
int core_count();

// Physical cores this process may use: those in its affinity mask, at most its cgroup's CPU quota, at least 1.
int usable_cores();

// The core of the affinity mask that the calling thread runs on, counted from 0, or -1.
int current_core();

// Keeps a thread on one of these cores; without effect where there are not so many.
void keep_on_core(pthread_t thread, int core);

}  // namespace kimi
