#include "services/common/disk_metrics.h"

#include <sys/statvfs.h>

#include <utility>

namespace rwkv::common {

std::vector<prometheus::MetricFamily> DiskMetrics::Collect() const {
  struct statvfs disk;
  if (statvfs(folder_.c_str(), &disk) != 0) return {};
  const auto family = [this](const char* name, const char* help, double value) {
    prometheus::MetricFamily family{prefix_ + name, help, prometheus::MetricType::Gauge, {}};
    prometheus::ClientMetric metric;
    metric.gauge.value = value;
    family.metric.push_back(metric);
    return family;
  };
  const auto block = static_cast<double>(disk.f_frsize);
  return {
      family("_disk_free_bytes", "Free on the file system of the data.", block * static_cast<double>(disk.f_bavail)),
      family("_disk_bytes", "Size of the file system of the data.", block * static_cast<double>(disk.f_blocks))};
}

}  // namespace rwkv::common
