#include "services/state_store/rpc/rpc_metrics.h"

#include <memory>

#include "absl/status/status.h"
#include "gtest/gtest.h"
#include "services/common/metrics.h"

namespace rwkv::state_store {
namespace {

TEST(RpcMetricsTest, TimeIsCountedByMethodAndErrorsByCode) {
  const std::unique_ptr<common::Metrics> metrics = *common::Metrics::Create("");
  const RpcMetrics calls(metrics.get(), {"first", "second"});
  const auto count = [&](const char* method) {
    return metrics
        ->Histogram("rwkv_state_store_rpc_seconds", "", common::Metrics::LatencyBuckets(), {{"method", method}})
        .Collect()
        .histogram.sample_count;
  };
  const auto errors = [&](const char* code) {
    return metrics->Counter("rwkv_state_store_errors_total", "", {{"code", code}}).Value();
  };
  EXPECT_TRUE(calls.Answer(1, [] { return absl::OkStatus(); }).ok());
  EXPECT_EQ(calls.Answer(1, [] { return absl::NotFoundError("no such"); }).error_message(), "no such");
  EXPECT_EQ(count("first"), 0u);
  EXPECT_EQ(count("second"), 2u);
  EXPECT_EQ(errors("not_found"), 1);
  calls.CountError(absl::OkStatus());
  calls.CountError(absl::AbortedError(""));
  EXPECT_EQ(errors("aborted"), 1);
  EXPECT_EQ(errors("not_found"), 1);
}

}  // namespace
}  // namespace rwkv::state_store
