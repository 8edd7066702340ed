// Sends a load's requests to a router and measures what comes back.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "rwkv/v1/common.pb.h"
#include "services/router/client/router_client.h"
#include "services/rwkvctl/load/load_clock.h"
#include "services/rwkvctl/load/progress_line.h"
#include "services/rwkvctl/load/report.h"
#include "services/rwkvctl/load/workload.h"

namespace rwkv::rwkvctl {

struct LoadOptions {
  WorkloadOptions workload;
  // Requests at a time. In a closed loop so many are sent, always; in an open one more have to wait here, and their
  // wait counts.
  int max_in_flight = 1;
  std::string model;
  v1::Sampling sampling;
  uint32_t vocab_size = 0;
  // Conversations at a time, each of `turns` turns in a session of its own, which is deleted afterwards. 0: no
  // sessions, but those that a trace names.
  uint32_t sessions = 0;
  uint32_t turns = 1;
  bool keep_sessions = false;
  absl::Duration deadline = absl::InfiniteDuration();  // Of a request, from when it is due.
  bool retry = false;                                  // Ask again when a refusal says when to; else it is a failure.
  LatencyLimits limits;
  MeasuredTime measured;
  absl::Duration progress_interval = absl::InfiniteDuration();
};

// One run. Stop() may come from any thread, before, while or after it runs.
class LoadRunner {
 public:
  // `client` and `clock` outlive it. Calls `on_progress`, one call at a time, every progress_interval.
  LoadRunner(LoadOptions options, router::RouterClient* client, LoadClock* clock,
             std::function<void(const LoadProgress&)> on_progress);
  ~LoadRunner();
  LoadRunner(const LoadRunner&) = delete;
  LoadRunner& operator=(const LoadRunner&) = delete;

  // Blocks until every request has ended.
  LoadReport Run();
  // No request is sent any more, and those on their way are cancelled.
  void Stop();

 private:
  class Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace rwkv::rwkvctl
