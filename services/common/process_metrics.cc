#include "services/common/process_metrics.h"

#include <dirent.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <utility>

namespace rwkv::common {
namespace {

using prometheus::MetricFamily;
using prometheus::MetricType;

MetricFamily Family(const char* name, const char* help, MetricType type, double value) {
  MetricFamily family{name, help, type, {}};
  prometheus::ClientMetric metric;
  (type == MetricType::Counter ? metric.counter.value : metric.gauge.value) = value;
  family.metric.push_back(metric);
  return family;
}

// Entries of /proc/self/fd, without the one that counts them. -1: unknown.
int OpenDescriptors() {
  DIR* const folder = opendir("/proc/self/fd");
  if (folder == nullptr) return -1;
  int count = 0;
  while (readdir(folder) != nullptr) ++count;
  closedir(folder);
  return count - 3;
}

// Of "btime SECONDS" in /proc/stat; 0: unknown.
int64_t BootTime() {
  std::ifstream file("/proc/stat");
  std::string word;
  int64_t value = 0;
  while (file >> word) {
    if (word == "btime" && file >> value) return value;
  }
  return 0;
}

}  // namespace

std::vector<MetricFamily> ProcessMetrics::Collect() const {
  std::vector<MetricFamily> families;
  std::ifstream file("/proc/self/stat");
  std::stringstream content;
  content << file.rdbuf();
  const std::string text = content.str();
  const size_t name_end = text.rfind(')');  // The name before it may hold blanks.
  if (name_end != std::string::npos) {
    // proc(5): after the name come state (3) and so on; 14 utime, 15 stime, 22 starttime, 23 vsize, 24 rss.
    std::istringstream fields(text.substr(name_end + 1));
    std::string state;
    double value[25] = {};
    fields >> state;
    for (int field = 4; field <= 24 && fields >> value[field]; ++field) {
    }
    if (fields) {
      const double ticks = static_cast<double>(sysconf(_SC_CLK_TCK));
      families.push_back(Family("process_cpu_seconds_total", "Processor time, user and system.", MetricType::Counter,
                                (value[14] + value[15]) / ticks));
      families.push_back(Family("process_resident_memory_bytes", "Resident memory.", MetricType::Gauge,
                                value[24] * static_cast<double>(sysconf(_SC_PAGESIZE))));
      families.push_back(Family("process_virtual_memory_bytes", "Virtual memory.", MetricType::Gauge, value[23]));
      if (const int64_t boot = BootTime(); boot > 0) {
        families.push_back(Family("process_start_time_seconds", "Start, in seconds since 1970.", MetricType::Gauge,
                                  static_cast<double>(boot) + value[22] / ticks));
      }
    }
  }
  if (const int open = OpenDescriptors(); open >= 0) {
    families.push_back(Family("process_open_fds", "Open descriptors.", MetricType::Gauge, open));
  }
  rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    families.push_back(Family("process_max_fds", "Bound on open descriptors.", MetricType::Gauge,
                              static_cast<double>(limit.rlim_cur)));
  }
  return families;
}

}  // namespace rwkv::common
