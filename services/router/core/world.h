// What the router's core asks of the world around it. The driver is the real one; tests/simulator has another.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "rwkv/v1/worker.pb.h"
#include "services/router/core/serving_model.h"
#include "services/router/pipeline/lane_load.h"

namespace rwkv::router {

// Called by the thread that owns the core, but for Post(), CallClock(), and what Run() runs.
class World {
 public:
  virtual ~World() = default;

  // The one clock of all that is decided.
  virtual absl::Time Now() = 0;
  // What deadlines of calls to others are given in.
  virtual absl::Time CallClock() = 0;
  virtual uint64_t Random() = 0;

  // Hands an event to the thread that owns the core. Any thread.
  virtual void Post(std::function<void()> event) = 0;
  // Runs what may wait for the store elsewhere: kCommit one after the other, the others a few at a time; kSnapshot what
  // may wait for where records are, too, which no turn is to wait behind. False: too much waits already; then it never
  // runs.
  enum class Queue { kStore, kCommit, kSnapshot };
  virtual bool Run(Queue queue, std::function<void()> work) = 0;

  // As those of Fleet.
  virtual bool Send(uint64_t epoch, const std::shared_ptr<const v1::ExecuteRequest>& command) = 0;
  virtual void EndEpoch(uint64_t epoch, const absl::Status& why) = 0;
  virtual void SetLoad(uint64_t epoch, const LaneLoad& load) = 0;
  virtual bool OthersDrive(const std::string& pool) = 0;
  // Why no lane is up; OK if one is.
  virtual absl::Status WhyNoLane() = 0;

  // The served model of a fingerprint; null: there is none.
  virtual std::shared_ptr<const ServingModel> FindModel(const std::string& fingerprint) = 0;

  // Some lane serves, or none does any more.
  virtual void SetServing(bool serving) = 0;
  // Of a drain: nothing is left to do.
  virtual void Drained() = 0;
  // The models of these pools are not there any more.
  virtual void PoolsDropped() = 0;
};

// Runs `work`, which may wait for the store, elsewhere, then `then` with its result on the core's thread. False: too
// much waits already.
template <typename Result>
bool RunStoreJob(World* world, std::function<Result()> work, std::function<void(Result)> then,
                 World::Queue queue = World::Queue::kStore) {
  return world->Run(queue, [world, work = std::move(work), then = std::move(then)] {
    auto result = std::make_shared<Result>(work());
    world->Post([then, result] { then(std::move(*result)); });
  });
}

}  // namespace rwkv::router
