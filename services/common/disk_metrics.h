// How full the file system of a folder is, looked up at every scrape.
#pragma once

#include <string>
#include <vector>

#include "prometheus/collectable.h"
#include "prometheus/metric_family.h"

namespace rwkv::common {

class DiskMetrics final : public prometheus::Collectable {
 public:
  // Gives PREFIX_disk_free_bytes, as far as this process may use it, and PREFIX_disk_bytes.
  DiskMetrics(std::string prefix, std::string folder) : prefix_(std::move(prefix)), folder_(std::move(folder)) {}
  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  const std::string prefix_;
  const std::string folder_;
};

}  // namespace rwkv::common
