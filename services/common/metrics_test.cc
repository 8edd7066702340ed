#include "services/common/metrics.h"

#include <algorithm>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "prometheus/text_serializer.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tcp_connection.h"

namespace rwkv::common {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;

TEST(MetricsTest, EndpointServesWhatWasCounted) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Metrics> metrics,
                       Metrics::Create("127.0.0.1:0", {{"process", "worker-0"}}));
  EXPECT_THAT(metrics->address(), StartsWith("127.0.0.1:"));
  EXPECT_NE(metrics->address(), "127.0.0.1:0");
  metrics->Counter("rwkv_test_events_total", "Events.", {{"kind", "a"}}).Increment(3);
  metrics->Gauge("rwkv_test_slots", "Slots.").Set(64);
  metrics->Histogram("rwkv_test_step_seconds", "Steps.", Metrics::LatencyBuckets()).Observe(0.0004);
  const std::string page = testing::HttpGet(metrics->address(), "/metrics");
  EXPECT_THAT(page, HasSubstr("200 OK"));
  EXPECT_THAT(page, HasSubstr("rwkv_test_events_total{process=\"worker-0\",kind=\"a\"} 3"));
  EXPECT_THAT(page, HasSubstr("rwkv_test_slots{process=\"worker-0\"} 64"));
  EXPECT_THAT(page, HasSubstr("rwkv_test_step_seconds_bucket{process=\"worker-0\",le=\"0.0005\"} 1"));
  EXPECT_THAT(testing::HttpGet(metrics->address(), "/other"), HasSubstr("404"));
}

TEST(MetricsTest, WithoutAddressThereIsNoEndpoint) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Metrics> metrics, Metrics::Create(""));
  EXPECT_EQ(metrics->address(), "");
  metrics->Counter("rwkv_test_events_total", "Events.").Increment();
  EXPECT_THAT(prometheus::TextSerializer().Serialize(metrics->registry().Collect()),
              HasSubstr("rwkv_test_events_total 1"));
}

TEST(MetricsTest, SameNameAndLabelsIsTheSameHandle) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Metrics> metrics, Metrics::Create(""));
  prometheus::Counter& a = metrics->Counter("rwkv_test_events_total", "Events.", {{"kind", "a"}});
  EXPECT_EQ(&a, &metrics->Counter("rwkv_test_events_total", "Events.", {{"kind", "a"}}));
  EXPECT_NE(&a, &metrics->Counter("rwkv_test_events_total", "Events.", {{"kind", "b"}}));
}

TEST(MetricsTest, AddressThatIsNoneIsRefused) {
  EXPECT_THAT(Metrics::Create("127.0.0.1"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("127.0.0.1")));
  EXPECT_THAT(Metrics::Create("127.0.0.1:99999"), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST(MetricsTest, PortInUseIsUnavailableAndNamed) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Metrics> first, Metrics::Create("127.0.0.1:0"));
  EXPECT_THAT(Metrics::Create(first->address()), StatusIs(absl::StatusCode::kUnavailable, HasSubstr(first->address())));
  EXPECT_THAT(testing::HttpGet(first->address(), "/metrics"), HasSubstr("200 OK")) << "the first one must not suffer";
}

TEST(MetricsTest, ForeignAddressIsUnavailable) {
  // TEST-NET-1 (RFC 5737) is nobody's.
  EXPECT_THAT(Metrics::Create("192.0.2.1:0"), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("192.0.2.1")));
}

TEST(MetricsTest, BucketsAscend) {
  for (const auto& buckets : {Metrics::LatencyBuckets(), Metrics::CountBuckets()}) {
    EXPECT_TRUE(std::is_sorted(buckets.begin(), buckets.end()));
    EXPECT_EQ(std::adjacent_find(buckets.begin(), buckets.end()), buckets.end());
  }
  EXPECT_THAT(Metrics::LatencyBuckets(),
              ElementsAre(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60));
  EXPECT_THAT(Metrics::CountBuckets(), AllOf(Contains(1), Contains(2), Contains(1024), Contains(4096)));
}

TEST(MetricsDeathTest, OneNameAsTwoKindsIsOurBug) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Metrics> metrics, Metrics::Create(""));
  metrics->Counter("rwkv_test_events_total", "Events.");
  EXPECT_DEATH(metrics->Gauge("rwkv_test_events_total", "Events."), "rwkv_test_events_total");
}

}  // namespace
}  // namespace rwkv::common
