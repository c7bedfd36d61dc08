#include "core/cpu_count.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <string>
#include <vector>

namespace kimi {
namespace {

// The first line of a small file, or "" when it can't be read.
std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// The physical cores of the affinity mask, each as the set of its hyperthreads: these share a sibling list.
const std::vector<cpu_set_t>& cores() {
  static const std::vector<cpu_set_t> found = [] {
    std::map<std::string, cpu_set_t> by_siblings;
    cpu_set_t mask;
    if (sched_getaffinity(0, sizeof mask, &mask) != 0) return std::vector<cpu_set_t>{};
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
      if (!CPU_ISSET(cpu, &mask)) continue;
      const std::string name = std::to_string(cpu);
      const std::string siblings = first_line("/sys/devices/system/cpu/cpu" + name + "/topology/thread_siblings_list");
      CPU_SET(cpu, &by_siblings[siblings.empty() ? name : siblings]);  // a new set is empty
    }
    std::vector<cpu_set_t> sets;
    for (const auto& [siblings, set] : by_siblings) sets.push_back(set);
    return sets;
  }();
  return found;
}

// cgroup v2 writes "max 100000" or "QUOTA PERIOD" in microseconds.
int cores_in_cgroup_quota() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  double quota = 0, period = 0;
  if (!(file >> quota >> period) || quota <= 0 || period <= 0) return 1 << 20;
  return std::max(1, int(quota / period));
}

}  // namespace

int core_count() { return std::max(1, int(cores().size())); }

int usable_cores() { return std::min(core_count(), cores_in_cgroup_quota()); }

int current_core() {
  const int cpu = sched_getcpu();
  for (size_t core = 0; core < cores().size(); core++)
    if (cpu >= 0 && CPU_ISSET(cpu, &cores()[core])) return int(core);
  return -1;
}

void keep_on_core(pthread_t thread, int core) {
  if (core >= 0 && core < int(cores().size())) pthread_setaffinity_np(thread, sizeof(cpu_set_t), &cores()[core]);
}

}  // namespace kimi
