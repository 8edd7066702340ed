#include "services/router/core/router_metrics.h"

#include <string>

namespace rwkv::router {
namespace {

using common::Metrics;
using prometheus::Histogram;

// Every code has one word, so that the label's values are a closed set.
std::string Cause(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
      return "bad_request";
    case absl::StatusCode::kNotFound:
      return "not_found";
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kUnimplemented:
      return "unsupported";
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kUnauthenticated:
      return "denied";
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kAlreadyExists:
      return "conflict";
    case absl::StatusCode::kResourceExhausted:
      return "overload";
    case absl::StatusCode::kUnavailable:
      return "unavailable";
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kCancelled:
      return "client_gone";
    case absl::StatusCode::kDataLoss:
      return "data_loss";
    default:
      return "internal";
  }
}

constexpr absl::StatusCode kCodes[] = {
    absl::StatusCode::kInvalidArgument,  absl::StatusCode::kNotFound,  absl::StatusCode::kFailedPrecondition,
    absl::StatusCode::kPermissionDenied, absl::StatusCode::kAborted,   absl::StatusCode::kResourceExhausted,
    absl::StatusCode::kUnavailable,      absl::StatusCode::kCancelled, absl::StatusCode::kDataLoss,
    absl::StatusCode::kInternal,
};

std::string Reason(v1::FinishReason reason) {
  switch (reason) {
    case v1::FINISH_REASON_LENGTH:
      return "length";
    case v1::FINISH_REASON_STOP_TOKEN:
      return "stop_token";
    case v1::FINISH_REASON_STOP_STRING:
      return "stop_string";
    case v1::FINISH_REASON_ERROR:
      return "error";
    default:
      return "cancelled";
  }
}

prometheus::Counter& Errors(Metrics* metrics, absl::StatusCode code) {
  return metrics->Counter("rwkv_router_errors_total", "Calls that ended with an error, by cause.",
                          {{"cause", Cause(code)}});
}

prometheus::Counter& Finishes(Metrics* metrics, v1::FinishReason reason) {
  return metrics->Counter("rwkv_router_turns_finished_total", "Turns that finished, by reason.",
                          {{"reason", Reason(reason)}});
}

prometheus::Counter& Tokens(Metrics* metrics, const std::string& kind) {
  return metrics->Counter("rwkv_router_tokens_total",
                          "Tokens: fed as input, generated, or reused from a slot or snapshot instead of being fed.",
                          {{"kind", kind}});
}

prometheus::Gauge& Slots(Metrics* metrics, const std::string& state) {
  return metrics->Gauge("rwkv_router_slots", "Slots of the pipeline by state.", {{"state", state}});
}

prometheus::Counter& Snapshots(Metrics* metrics, const std::string& result) {
  return metrics->Counter("rwkv_router_snapshots_total",
                          "Snapshots: committed, failed on the way, or dropped because they could not be read.",
                          {{"result", result}});
}

prometheus::Counter& PrefixLookups(Metrics* metrics, const std::string& result) {
  return metrics->Counter("rwkv_router_prefix_lookups_total",
                          "Inputs that were looked up in the prefix cache, by result.", {{"result", result}});
}

// A long answer takes hours: 10 ms to 7,680 s.
Histogram::BucketBoundaries CallBuckets() {
  return {0.01, 0.03, 0.1, 0.3, 1, 2.5, 5, 10, 20, 40, 60, 120, 240, 480, 960, 1920, 7680};
}

// 1 to 524,288, the most that --max_generated_tokens allows by itself.
Histogram::BucketBoundaries TokenBuckets() { return {1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 524288}; }

}  // namespace

RouterMetrics::RouterMetrics(Metrics* metrics)
    : ttft_seconds(metrics->Histogram("rwkv_router_ttft_seconds", "Arrival of a request to its first token leaving.",
                                      Metrics::LatencyBuckets())),
      inter_token_seconds(metrics->Histogram("rwkv_router_inter_token_seconds",
                                             "Time between two tokens of a turn coming from the pipeline.",
                                             Metrics::LatencyBuckets())),
      queue_seconds(metrics->Histogram("rwkv_router_queue_seconds",
                                       "Arrival of a request to its first rows leaving for the pipeline.",
                                       Metrics::LatencyBuckets())),
      call_seconds(metrics->Histogram("rwkv_router_call_seconds", "Arrival of a request to the end of its answer.",
                                      CallBuckets())),
      prefill_seconds(metrics->Histogram("rwkv_router_prefill_seconds",
                                         "First rows of a request leaving to its first token coming.", CallBuckets())),
      decode_seconds(
          metrics->Histogram("rwkv_router_decode_seconds", "First token of a request to its last.", CallBuckets())),
      call_prompt_tokens(
          metrics->Histogram("rwkv_router_call_prompt_tokens", "Input tokens of a request.", TokenBuckets())),
      call_generated_tokens(
          metrics->Histogram("rwkv_router_call_generated_tokens", "Tokens of an answer.", TokenBuckets())),
      call_max_tokens(
          metrics->Histogram("rwkv_router_call_max_tokens", "Tokens that an answer might have had.", TokenBuckets())),
      call_token_seconds(metrics->Histogram("rwkv_router_call_token_seconds",
                                            "Time between two tokens, the mean of a request.",
                                            Metrics::LatencyBuckets())),
      call_inference_seconds(metrics->Histogram("rwkv_router_call_inference_seconds",
                                                "First rows of a request leaving to its last token coming.",
                                                CallBuckets())),
      recovery_seconds(metrics->Histogram("rwkv_router_recovery_seconds",
                                          "A turn losing its pipeline to its having a slot again.",
                                          Metrics::LatencyBuckets())),
      batch_rows(metrics->Histogram("rwkv_router_batch_rows", "Rows of a step.", Metrics::CountBuckets())),
      store_commit_seconds(metrics->Histogram("rwkv_router_store_commit_seconds",
                                              "One group commit of tokens to the state store, retries included.",
                                              Metrics::LatencyBuckets())),
      waiting_turns(metrics->Gauge("rwkv_router_waiting_turns", "Requests that wait to be started, or to go on.")),
      running_turns(metrics->Gauge("rwkv_router_running_turns", "Requests that were started and have not ended.")),
      microbatches_in_flight(metrics->Gauge("rwkv_router_microbatches_in_flight", "Steps in the pipeline.")),
      slots_used(Slots(metrics, "used")),
      slots_warm(Slots(metrics, "warm")),
      slots_free(Slots(metrics, "free")),
      last_step_timestamp_seconds(
          metrics->Gauge("rwkv_router_last_step_timestamp_seconds", "When a step came back last; 0: never.")),
      last_commit_timestamp_seconds(metrics->Gauge("rwkv_router_last_commit_timestamp_seconds",
                                                   "When tokens were durable in the store last; 0: never.")),
      prompt_tokens(Tokens(metrics, "prompt")),
      generated_tokens(Tokens(metrics, "generated")),
      reused_tokens(Tokens(metrics, "reused")),
      prefix_hits(PrefixLookups(metrics, "hit")),
      prefix_misses(PrefixLookups(metrics, "miss")),
      prefix_errors(PrefixLookups(metrics, "error")),
      prefixes_kept(metrics->Counter("rwkv_router_prefixes_kept_total",
                                     "States that were put into the prefix cache, or were there already.")),
      recovered_turns(metrics->Counter("rwkv_router_recovered_turns_total",
                                       "Turns that went on after the epoch they ran in was lost.")),
      replayed_tokens(
          metrics->Counter("rwkv_router_replayed_tokens_total", "Tokens that were fed again after an epoch was lost.")),
      yielded_turns(
          metrics->Counter("rwkv_router_yielded_turns_total", "Times that a turn gave its slot to one that waited.")),
      epochs(metrics->Counter("rwkv_router_epochs_total", "Epochs that opened.")),
      epochs_lost(metrics->Counter("rwkv_router_epochs_lost_total", "Epochs that ended other than by a shutdown.")),
      snapshots_committed(Snapshots(metrics, "committed")),
      snapshots_failed(Snapshots(metrics, "failed")),
      snapshots_dropped(Snapshots(metrics, "dropped")) {
  // All label values exist from the start, so that a rate over them is never a gap.
  for (const absl::StatusCode code : kCodes) errors_[Cause(code)] = &Errors(metrics, code);
  for (const v1::FinishReason reason :
       {v1::FINISH_REASON_LENGTH, v1::FINISH_REASON_STOP_TOKEN, v1::FINISH_REASON_STOP_STRING,
        v1::FINISH_REASON_CANCELLED, v1::FINISH_REASON_ERROR}) {
    finishes_[Reason(reason)] = &Finishes(metrics, reason);
  }
}

void RouterMetrics::CountError(const absl::Status& status) {
  if (!status.ok()) errors_.at(Cause(status.code()))->Increment();
}

void RouterMetrics::CountFinish(v1::FinishReason reason) { finishes_.at(Reason(reason))->Increment(); }

}  // namespace rwkv::router
