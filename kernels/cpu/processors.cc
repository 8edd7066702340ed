#include "kernels/cpu/processors.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"

namespace rwkv::kernels::cpu {
namespace {

std::string Read(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// ceil(quota / period); 0 where it says none ("max", -1) or is not there.
int Quota(absl::string_view quota, absl::string_view period) {
  int64_t microseconds = 0;
  int64_t of = 0;
  if (!absl::SimpleAtoi(quota, &microseconds) || !absl::SimpleAtoi(period, &of)) return 0;
  if (microseconds <= 0 || of <= 0) return 0;
  return static_cast<int>(std::min<int64_t>((microseconds + of - 1) / of, 1 << 20));
}

int QuotaOfFolder(const std::string& folder) {
  const std::string both = Read(folder + "/cpu.max");
  const std::vector<absl::string_view> words = absl::StrSplit(both, absl::ByAnyChar(" \n"), absl::SkipEmpty());
  if (words.size() == 2) return Quota(words[0], words[1]);
  return Quota(Read(folder + "/cpu.cfs_quota_us"), Read(folder + "/cpu.cfs_period_us"));
}

}  // namespace

int ProcessorQuota(const std::string& groups, const std::string& root) {
  int smallest = 0;
  for (const absl::string_view line : absl::StrSplit(groups, '\n', absl::SkipEmpty())) {
    const std::vector<absl::string_view> fields = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (fields.size() != 3) continue;
    std::string mount = root;  // "0::PATH" is version 2's one hierarchy.
    if (!fields[1].empty()) {
      const std::vector<absl::string_view> controllers = absl::StrSplit(fields[1], ',');
      if (std::find(controllers.begin(), controllers.end(), "cpu") == controllers.end()) continue;
      mount += "/cpu";
    }
    // In a container the path is often one of the host, of which only the mount itself can be seen.
    for (std::string path(fields[2]);; path.resize(path.rfind('/'))) {
      const int quota = QuotaOfFolder(path == "/" ? mount : mount + path);
      if (quota > 0 && (smallest == 0 || quota < smallest)) smallest = quota;
      if (path.rfind('/') == std::string::npos) break;
    }
  }
  return smallest;
}

int ProcessorsOfThisProcess() {
  int processors = static_cast<int>(std::thread::hardware_concurrency());
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) processors = CPU_COUNT(&allowed);
  const int quota = ProcessorQuota(Read("/proc/self/cgroup"), "/sys/fs/cgroup");
  return std::max(1, quota > 0 ? std::min(quota, processors) : processors);
}

}  // namespace rwkv::kernels::cpu
