// What Prometheus' own client libraries say of a process: memory, processor time, descriptors, start.
#pragma once

#include <vector>

#include "prometheus/collectable.h"
#include "prometheus/metric_family.h"

namespace rwkv::common {

// Read from /proc at every scrape. Thread-safe. What cannot be read is left out.
class ProcessMetrics final : public prometheus::Collectable {
 public:
  std::vector<prometheus::MetricFamily> Collect() const override;
};

}  // namespace rwkv::common
