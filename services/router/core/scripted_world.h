// A world in which nothing happens by itself, for tests of the core and of its parts: what it was asked for lies there
// until the test has it done.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "rwkv/v1/worker.pb.h"
#include "services/router/core/serving_model.h"
#include "services/router/core/world.h"
#include "services/router/pipeline/lane_load.h"

namespace rwkv::router {

class ScriptedWorld final : public World {
 public:
  struct Command {
    uint64_t epoch = 0;
    std::shared_ptr<const v1::ExecuteRequest> request;
  };

  absl::Time now = absl::FromUnixSeconds(1767225600);
  std::deque<std::function<void()>> jobs;
  std::deque<std::function<void()>> events;
  std::vector<Command> commands;
  std::vector<std::pair<uint64_t, absl::Status>> ended;  // Epochs.
  std::vector<bool> told_serving;
  std::shared_ptr<const ServingModel> model;

  // All jobs, and what they post; false: there was none.
  bool RunJobs() {
    if (jobs.empty() && events.empty()) return false;
    RunAll(jobs);
    RunEvents();
    return true;
  }
  void RunEvents() { RunAll(events); }

  absl::Time Now() override { return now; }
  absl::Time CallClock() override { return absl::Now(); }
  uint64_t Random() override { return ++random_; }
  void Post(std::function<void()> event) override { events.push_back(std::move(event)); }
  bool Run(Queue /*queue*/, std::function<void()> work) override {
    jobs.push_back(std::move(work));
    return true;
  }
  bool Send(uint64_t epoch, const std::shared_ptr<const v1::ExecuteRequest>& command) override {
    commands.push_back({epoch, command});
    return true;
  }
  void EndEpoch(uint64_t epoch, const absl::Status& why) override { ended.emplace_back(epoch, why); }
  void SetLoad(uint64_t /*epoch*/, const LaneLoad& /*load*/) override {}
  bool OthersDrive(const std::string& /*pool*/) override { return false; }
  absl::Status WhyNoLane() override { return absl::OkStatus(); }
  std::shared_ptr<const ServingModel> FindModel(const std::string& /*fingerprint*/) override { return model; }
  void SetServing(bool serving) override { told_serving.push_back(serving); }
  void Drained() override {}
  void PoolsDropped() override {}

 private:
  static void RunAll(std::deque<std::function<void()>>& all) {
    while (!all.empty()) {
      const std::function<void()> one = std::move(all.front());
      all.pop_front();
      one();
    }
  }

  uint64_t random_ = 0;
};

}  // namespace rwkv::router
