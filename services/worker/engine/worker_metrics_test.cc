#include "services/worker/engine/worker_metrics.h"

#include <map>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "prometheus/metric_family.h"
#include "services/common/metrics.h"
#include "services/worker/engine/slot_table.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

// What a dashboard reads: every series by name and label, of histograms the sum.
std::map<std::string, double> Exported(common::Metrics& metrics) {
  std::map<std::string, double> values;
  for (const prometheus::MetricFamily& family : metrics.registry().Collect()) {
    for (const prometheus::ClientMetric& metric : family.metric) {
      std::string name = family.name;
      for (const auto& label : metric.label) absl::StrAppend(&name, "{", label.name, "=", label.value, "}");
      values[name] = family.type == prometheus::MetricType::Histogram ? metric.histogram.sample_sum
                     : family.type == prometheus::MetricType::Gauge   ? metric.gauge.value
                                                                      : metric.counter.value;
    }
  }
  return values;
}

TEST(WorkerMetricsTest, EveryHandleHasItsOwnNameAndLabel) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<common::Metrics> metrics, common::Metrics::Create(""));
  WorkerMetrics worker(*metrics);
  worker.prefill_step_seconds.Observe(1);
  worker.decode_step_seconds.Observe(2);
  worker.receive_wait_seconds.Observe(3);
  worker.send_wait_seconds.Observe(4);
  worker.batch_rows.Observe(5);
  worker.tokens.Increment(6);
  worker.slots.Set(7);
  worker.slots_used.Set(8);
  worker.state_bytes.Set(9);
  worker.snapshot_save_seconds.Observe(10);
  worker.snapshot_load_seconds.Observe(11);
  worker.snapshot_bytes_in_flight.Set(12);
  worker.epochs.Increment(13);
  worker.attach_errors.Increment(14);
  worker.save_errors.Increment(15);
  worker.save_overflows.Increment(16);
  worker.step_errors.Increment(17);
  worker.link_errors.Increment(18);
  worker.link_sent_bytes.Increment(26);
  worker.kept_state_bytes.Set(27);
  worker.kept_state_hits.Increment(28);
  worker.kept_state_misses.Increment(29);
  const auto refused = [&worker](RefusalCause cause, double count) {
    worker.refused_entries[static_cast<int>(cause)]->Increment(count);
  };
  refused(RefusalCause::kSlot, 19);
  refused(RefusalCause::kSequence, 20);
  refused(RefusalCause::kPosition, 21);
  refused(RefusalCause::kTokens, 22);
  refused(RefusalCause::kRows, 23);
  refused(RefusalCause::kContext, 24);
  refused(RefusalCause::kNumeric, 25);

  EXPECT_THAT(Exported(*metrics), ::testing::ContainerEq(std::map<std::string, double>{
                                      {"rwkv_worker_kept_state_bytes", 27},
                                      {"rwkv_worker_kept_state_lookups_total{result=hit}", 28},
                                      {"rwkv_worker_kept_state_lookups_total{result=miss}", 29},
                                      {"rwkv_worker_step_seconds{phase=prefill}", 1},
                                      {"rwkv_worker_step_seconds{phase=decode}", 2},
                                      {"rwkv_worker_link_receive_wait_seconds", 3},
                                      {"rwkv_worker_link_send_wait_seconds", 4},
                                      {"rwkv_worker_link_sent_bytes_total", 26},
                                      {"rwkv_worker_batch_rows", 5},
                                      {"rwkv_worker_tokens_total", 6},
                                      {"rwkv_worker_slots", 7},
                                      {"rwkv_worker_slots_used", 8},
                                      {"rwkv_worker_state_bytes", 9},
                                      {"rwkv_worker_snapshot_save_seconds", 10},
                                      {"rwkv_worker_snapshot_load_seconds", 11},
                                      {"rwkv_worker_snapshot_bytes_in_flight", 12},
                                      {"rwkv_worker_epochs_total", 13},
                                      {"rwkv_worker_errors_total{cause=attach}", 14},
                                      {"rwkv_worker_errors_total{cause=save}", 15},
                                      {"rwkv_worker_errors_total{cause=save_overflow}", 16},
                                      {"rwkv_worker_errors_total{cause=step}", 17},
                                      {"rwkv_worker_errors_total{cause=link}", 18},
                                      {"rwkv_worker_refused_entries_total{cause=slot}", 19},
                                      {"rwkv_worker_refused_entries_total{cause=sequence}", 20},
                                      {"rwkv_worker_refused_entries_total{cause=position}", 21},
                                      {"rwkv_worker_refused_entries_total{cause=tokens}", 22},
                                      {"rwkv_worker_refused_entries_total{cause=rows}", 23},
                                      {"rwkv_worker_refused_entries_total{cause=context}", 24},
                                      {"rwkv_worker_refused_entries_total{cause=numeric}", 25},
                                  }));
}

}  // namespace
}  // namespace rwkv::worker
