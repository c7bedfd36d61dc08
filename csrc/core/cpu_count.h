#pragma once

namespace kimi {

// Physical cores this process may use: those in its affinity mask, at most its cgroup's CPU quota, at least 1.
int usable_cores();

}  // namespace kimi
