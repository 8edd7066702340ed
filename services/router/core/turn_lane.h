// What the core knows of a lane, and of the lanes that are as good as each other. Plain data, the
// core's.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "rwkv/v1/common.pb.h"
#include "services/router/pipeline/lane_load.h"
#include "services/router/pipeline/stage_plan.h"
#include "services/router/scheduler/scheduler.h"

namespace rwkv::router {

// One pipeline that this router drives, for the time of an epoch.
struct TurnLane {
  TurnLane(uint64_t epoch, StagePlan plan, const Scheduler::Options& options)
      : epoch(epoch), plan(std::move(plan)), scheduler(options) {}

  LaneLoad Load() const {
    return {scheduler.sequences(), scheduler.slots_in_use(), scheduler.slots_warm(), scheduler.rows_waiting()};
  }

  const uint64_t epoch;
  const StagePlan plan;
  std::string pool;
  Scheduler scheduler;
  std::multimap<std::pair<SequenceId, uint64_t>, std::string> save_ids;  // Of SaveCommands to come, in their order.
  absl::Time last_progress;
  int going = 0;         // Turns in it that decode without being asked, as of the last sweep.
  bool closing = false;  // It is given away: turns leave it.
  LaneLoad told_load;    // As the fleet was told.
};

// All lanes of one model and one numeric family: a turn stays among them, so that its tokens are the same bits wherever
// it goes on.
struct Pool {
  std::string name;     // As PoolName() says it.
  v1::ModelInfo model;  // Of the lane that came up last.
  std::string numeric_family;
  int lanes = 0;
  int slots = 0;  // Of all lanes; while there is none, of those that were there last.
};

inline std::string PoolName(const std::string& fingerprint, const std::string& numeric_family) {
  return absl::StrCat(fingerprint, "/", numeric_family);
}

// Turns that have a part of the slots, by pool.
using PoolUse = std::map<std::string, int>;

}  // namespace rwkv::router
