// The metrics of a worker, resolved once.
#pragma once

#include <array>

#include "prometheus/counter.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "services/common/metrics.h"
#include "services/worker/engine/slot_table.h"

namespace rwkv::worker {

// Thread-safe. Lives as long as `metrics`.
struct WorkerMetrics {
  explicit WorkerMetrics(common::Metrics& metrics);

  prometheus::Histogram& prefill_step_seconds;  // A step with an entry of several tokens; computing alone.
  prometheus::Histogram& decode_step_seconds;
  prometheus::Histogram& receive_wait_seconds;  // For the stage before.
  prometheus::Histogram& send_wait_seconds;     // For the link to take a frame.
  prometheus::Counter& link_sent_bytes;         // Rows, by whatever link.
  prometheus::Histogram& batch_rows;
  prometheus::Counter& tokens;
  prometheus::Gauge& slots;
  prometheus::Gauge& slots_used;
  prometheus::Gauge& state_bytes;
  prometheus::Histogram& snapshot_save_seconds;
  prometheus::Histogram& snapshot_load_seconds;
  prometheus::Gauge& snapshot_bytes_in_flight;
  prometheus::Gauge& kept_state_bytes;
  prometheus::Counter& kept_state_hits;
  prometheus::Counter& kept_state_misses;
  prometheus::Counter& epochs;
  std::array<prometheus::Counter*, kRefusalCauses> refused_entries;  // By RefusalCause.
  prometheus::Counter& attach_errors;
  prometheus::Counter& save_errors;
  prometheus::Counter& save_overflows;  // Refused: too many bytes in flight.
  prometheus::Counter& step_errors;
  prometheus::Counter& link_errors;
};

}  // namespace rwkv::worker
