// How many processors a process may use.
#pragma once

#include <string>

namespace rwkv::kernels::cpu {

// Of this process: its affinity, bounded by the quota of its control group. At least 1.
int ProcessorsOfThisProcess();

// The quota of control groups, in processors rounded up; 0 if there is none. `groups` is the text of
// /proc/self/cgroup, `root` where the hierarchies are mounted (/sys/fs/cgroup). Both versions; a group and all above.
int ProcessorQuota(const std::string& groups, const std::string& root);

}  // namespace rwkv::kernels::cpu
