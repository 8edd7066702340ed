#include "services/common/disk_metrics.h"

#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "prometheus/metric_family.h"

namespace rwkv::common {
namespace {

TEST(DiskMetricsTest, SaysHowMuchIsFree) {
  const std::vector<prometheus::MetricFamily> families = DiskMetrics("x", ::testing::TempDir()).Collect();
  ASSERT_EQ(families.size(), 2u);
  EXPECT_EQ(families[0].name, "x_disk_free_bytes");
  EXPECT_GT(families[0].metric.at(0).gauge.value, 0);
  EXPECT_EQ(families[1].name, "x_disk_bytes");
  EXPECT_GE(families[1].metric.at(0).gauge.value, families[0].metric.at(0).gauge.value);
  EXPECT_TRUE(DiskMetrics("x", "/nonexistent").Collect().empty());
}

}  // namespace
}  // namespace rwkv::common
