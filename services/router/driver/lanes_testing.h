// Several pipelines, for tests.
#pragma once

#include <cstddef>
#include <string>

#include "absl/time/clock.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/testing/fake_cluster.h"
#include "services/worker/client/fake_worker.h"

namespace rwkv::router {

// Pipelines of one worker each.
inline worker::FakePipeline::Options Named(const std::string& name, int slots = 8) {
  worker::FakePipeline::Options options;
  options.name = name;
  options.stage_count = 1;
  options.slots = slots;
  return options;
}

inline TurnManager::Options Router(const std::string& name) {
  TurnManager::Options options;
  options.router = name;
  options.snapshot_interval_tokens = 8;
  return options;
}

inline bool WaitForLanes(TurnManager& router, size_t count) {
  return WaitUntil([&] { return router.Lanes(absl::Now() + kTestLimit).size() == count; });
}

}  // namespace rwkv::router
