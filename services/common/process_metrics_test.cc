#include "services/common/process_metrics.h"

#include <fcntl.h>
#include <unistd.h>

#include <ctime>
#include <map>
#include <string>

#include "gtest/gtest.h"

namespace rwkv::common {
namespace {

std::map<std::string, double> Values() {
  std::map<std::string, double> values;
  for (const prometheus::MetricFamily& family : ProcessMetrics().Collect()) {
    values[family.name] = family.metric.at(0).gauge.value + family.metric.at(0).counter.value;
  }
  return values;
}

TEST(ProcessMetricsTest, SaysWhatTheProcessUses) {
  const std::map<std::string, double> before = Values();
  EXPECT_GT(before.at("process_resident_memory_bytes"), 1e6);
  EXPECT_LT(before.at("process_resident_memory_bytes"), before.at("process_virtual_memory_bytes"));
  EXPECT_GE(before.at("process_cpu_seconds_total"), 0);
  EXPECT_NEAR(before.at("process_start_time_seconds"), static_cast<double>(std::time(nullptr)), 600);
  EXPECT_GE(before.at("process_open_fds"), 3);
  EXPECT_LT(before.at("process_open_fds"), before.at("process_max_fds"));
  const int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
  EXPECT_EQ(Values().at("process_open_fds"), before.at("process_open_fds") + 1);
  close(fd);
}

}  // namespace
}  // namespace rwkv::common
