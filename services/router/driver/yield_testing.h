// Turns that take turns in a slot, for tests.
#pragma once

#include <cstddef>

#include "absl/time/time.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "services/router/driver/turn_manager.h"
#include "services/router/testing/fake_cluster.h"
#include "services/worker/client/fake_worker.h"

namespace rwkv::router {

inline worker::FakePipeline::Options Slots(int count) {
  worker::FakePipeline::Options options;
  options.slots = count;
  return options;
}

inline TurnManager::Options Quantum(absl::Duration quantum) {
  TurnManager::Options options;
  options.slot_quantum = quantum;
  options.retry_delay = absl::Milliseconds(1);
  options.tick = absl::Milliseconds(2);
  return options;
}

// Starts a call and lets single steps through until it has `count` messages.
inline FakeCluster::Call StartAndStep(FakeCluster& cluster, const v1::GenerateRequest& request, size_t count) {
  cluster.pipeline().PauseSteps();
  const FakeCluster::Call call = cluster.Start(request);
  EXPECT_TRUE(WaitUntil([&] {
    cluster.pipeline().AllowSteps(1);
    return call.stream->received().size() >= count;
  }));
  return call;
}

}  // namespace rwkv::router
