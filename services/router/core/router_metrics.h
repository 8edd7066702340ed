// The router's metrics. Handles are resolved once; labels come from closed sets.
#pragma once

#include <map>
#include <string>

#include "absl/status/status.h"
#include "prometheus/counter.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "rwkv/v1/common.pb.h"
#include "services/common/metrics.h"

namespace rwkv::router {

// Thread-safe.
class RouterMetrics {
 public:
  // `metrics` outlives it.
  explicit RouterMetrics(common::Metrics* metrics);

  // A call ended with this; OK counts nothing.
  void CountError(const absl::Status& status);
  void CountFinish(v1::FinishReason reason);

  prometheus::Histogram& ttft_seconds;
  prometheus::Histogram& inter_token_seconds;
  prometheus::Histogram& queue_seconds;
  // Of calls with an answer that ended well.
  prometheus::Histogram& call_seconds;
  prometheus::Histogram& prefill_seconds;
  prometheus::Histogram& decode_seconds;
  prometheus::Histogram& call_prompt_tokens;
  prometheus::Histogram& call_generated_tokens;
  prometheus::Histogram& call_max_tokens;
  prometheus::Histogram& call_token_seconds;      // Mean time between two tokens of the call.
  prometheus::Histogram& call_inference_seconds;  // First rows to last token.
  prometheus::Histogram& recovery_seconds;        // A turn lost its pipeline, and has a slot again.
  prometheus::Histogram& batch_rows;
  prometheus::Histogram& store_commit_seconds;
  prometheus::Gauge& waiting_turns;
  prometheus::Gauge& running_turns;
  prometheus::Gauge& microbatches_in_flight;
  prometheus::Gauge& slots_used;
  prometheus::Gauge& slots_warm;
  prometheus::Gauge& slots_free;
  prometheus::Gauge& last_step_timestamp_seconds;
  prometheus::Gauge& last_commit_timestamp_seconds;
  prometheus::Counter& prompt_tokens;
  prometheus::Counter& generated_tokens;
  prometheus::Counter& reused_tokens;
  prometheus::Counter& prefix_hits;
  prometheus::Counter& prefix_misses;
  prometheus::Counter& prefix_errors;  // The store could not be asked; the input is read.
  prometheus::Counter& prefixes_kept;
  prometheus::Counter& recovered_turns;
  prometheus::Counter& replayed_tokens;  // Fed again after that.
  prometheus::Counter& yielded_turns;
  prometheus::Counter& epochs;
  prometheus::Counter& epochs_lost;
  prometheus::Counter& snapshots_committed;
  prometheus::Counter& snapshots_failed;
  prometheus::Counter& snapshots_dropped;

 private:
  // By label value; filled by the constructor.
  std::map<std::string, prometheus::Counter*> errors_;
  std::map<std::string, prometheus::Counter*> finishes_;
};

}  // namespace rwkv::router
