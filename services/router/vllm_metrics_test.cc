#include "services/router/vllm_metrics.h"

#include <memory>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "prometheus/text_serializer.h"
#include "services/common/metrics.h"
#include "services/router/core/router_metrics.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::testing::HasSubstr;

TEST(VllmMetricsTest, SaysOurNumbersUnderTheirNames) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<common::Metrics> metrics, common::Metrics::Create(""));
  RouterMetrics ours(metrics.get());
  ours.running_turns.Set(3);
  ours.slots_used.Set(1);
  ours.slots_warm.Set(1);
  ours.slots_free.Set(2);
  ours.prompt_tokens.Increment(10);
  ours.reused_tokens.Increment(5);
  ours.generated_tokens.Increment(7);
  ours.CountFinish(v1::FINISH_REASON_STOP_TOKEN);
  ours.CountFinish(v1::FINISH_REASON_STOP_STRING);
  ours.CountFinish(v1::FINISH_REASON_CANCELLED);
  ours.ttft_seconds.Observe(0.02);
  ours.call_seconds.Observe(100);
  const VllmMetrics aliases(&metrics->registry(), [] { return "tiny"; });
  const std::string text = prometheus::TextSerializer().Serialize(aliases.Collect());
  for (const char* line : {
           "vllm:num_requests_running{model_name=\"tiny\",engine=\"0\"} 3",
           "vllm:num_requests_waiting{model_name=\"tiny\",engine=\"0\"} 0",
           "vllm:kv_cache_usage_perc{model_name=\"tiny\",engine=\"0\"} 0.25",
           "vllm:prompt_tokens_total{model_name=\"tiny\",engine=\"0\"} 15",
           "vllm:prefix_cache_hits_total{model_name=\"tiny\",engine=\"0\"} 5",
           "vllm:generation_tokens_total{model_name=\"tiny\",engine=\"0\"} 7",
           "vllm:request_success_total{model_name=\"tiny\",engine=\"0\",finished_reason=\"stop\"} 2",
           "vllm:request_success_total{model_name=\"tiny\",engine=\"0\",finished_reason=\"abort\"} 1",
           "vllm:request_success_total{model_name=\"tiny\",engine=\"0\",finished_reason=\"length\"} 0",
           "vllm:time_to_first_token_seconds_count{model_name=\"tiny\",engine=\"0\"} 1",
           "vllm:e2e_request_latency_seconds_bucket{model_name=\"tiny\",engine=\"0\",le=\"60\"} 0",
           "vllm:e2e_request_latency_seconds_bucket{model_name=\"tiny\",engine=\"0\",le=\"120\"} 1",
           "# TYPE vllm:iteration_tokens_total histogram",
       }) {
    EXPECT_THAT(text, HasSubstr(line));
  }
}

}  // namespace
}  // namespace rwkv::router
