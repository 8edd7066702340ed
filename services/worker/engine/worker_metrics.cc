#include "services/worker/engine/worker_metrics.h"

#include <string>

namespace rwkv::worker {
namespace {

prometheus::Histogram& StepSeconds(common::Metrics& metrics, const char* phase) {
  return metrics.Histogram("rwkv_worker_step_seconds", "Computing one step.", common::Metrics::LatencyBuckets(),
                           {{"phase", phase}});
}

prometheus::Counter& Errors(common::Metrics& metrics, const char* cause) {
  return metrics.Counter("rwkv_worker_errors_total", "What went wrong.", {{"cause", cause}});
}

prometheus::Counter& KeptLookups(common::Metrics& metrics, const char* result) {
  return metrics.Counter("rwkv_worker_kept_state_lookups_total",
                         "States of the prefix cache to attach from: in memory already, or fetched from the store.",
                         {{"result", result}});
}

}  // namespace

WorkerMetrics::WorkerMetrics(common::Metrics& metrics)
    : prefill_step_seconds(StepSeconds(metrics, "prefill")),
      decode_step_seconds(StepSeconds(metrics, "decode")),
      receive_wait_seconds(metrics.Histogram("rwkv_worker_link_receive_wait_seconds",
                                             "Waiting for the stage before to send a step.",
                                             common::Metrics::LatencyBuckets())),
      send_wait_seconds(metrics.Histogram("rwkv_worker_link_send_wait_seconds",
                                          "Handing a step to the link to the next stage.",
                                          common::Metrics::LatencyBuckets())),
      link_sent_bytes(
          metrics.Counter("rwkv_worker_link_sent_bytes_total", "Rows handed to the link to the next stage.")),
      batch_rows(metrics.Histogram("rwkv_worker_batch_rows", "Rows of a step.", common::Metrics::CountBuckets())),
      tokens(metrics.Counter("rwkv_worker_tokens_total", "Rows computed.")),
      slots(metrics.Gauge("rwkv_worker_slots", "Slots of the state pool.")),
      slots_used(metrics.Gauge("rwkv_worker_slots_used", "Slots that hold a sequence, running or warm.")),
      state_bytes(metrics.Gauge("rwkv_worker_state_bytes", "Memory of the state pool.")),
      snapshot_save_seconds(metrics.Histogram("rwkv_worker_snapshot_save_seconds",
                                              "From the copy of a state to all its records stored.",
                                              common::Metrics::LatencyBuckets())),
      snapshot_load_seconds(metrics.Histogram("rwkv_worker_snapshot_load_seconds",
                                              "From the attach to all records of a state fetched.",
                                              common::Metrics::LatencyBuckets())),
      snapshot_bytes_in_flight(
          metrics.Gauge("rwkv_worker_snapshot_bytes_in_flight", "Copies of states that are not yet stored.")),
      kept_state_bytes(metrics.Gauge("rwkv_worker_kept_state_bytes",
                                     "Memory of states that several sequences begin with (--kept_state_bytes).")),
      kept_state_hits(KeptLookups(metrics, "hit")),
      kept_state_misses(KeptLookups(metrics, "miss")),
      epochs(metrics.Counter("rwkv_worker_epochs_total", "Epochs opened.")),
      attach_errors(Errors(metrics, "attach")),
      save_errors(Errors(metrics, "save")),
      save_overflows(Errors(metrics, "save_overflow")),
      step_errors(Errors(metrics, "step")),
      link_errors(Errors(metrics, "link")) {
  static constexpr const char* kCauses[kRefusalCauses] = {"slot", "sequence", "position", "tokens",
                                                          "rows", "context",  "numeric"};
  for (int i = 0; i < kRefusalCauses; ++i) {
    refused_entries[i] = &metrics.Counter("rwkv_worker_refused_entries_total",
                                          "Entries of steps that this stage refused.", {{"cause", kCauses[i]}});
  }
}

}  // namespace rwkv::worker
