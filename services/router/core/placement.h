// The lanes that a router drives, the pools that they make, and which of them a turn runs on: warm first, then where it
// waits least, and never among kernels of another numeric family than it began with.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "services/router/core/turn.h"
#include "services/router/core/turn_lane.h"
#include "services/router/pipeline/stage_plan.h"

namespace rwkv::router {

// Part of the core: one thread at a time, no clock of its own. Turns are looked at, never changed.
class Placement {
 public:
  using Lanes = std::map<uint64_t, std::unique_ptr<TurnLane>>;  // By epoch.
  using Pools = std::map<std::string, Pool>;                    // By name.

  explicit Placement(int max_sequences) : max_sequences_(max_sequences) {}

  const Lanes& lanes() const { return lanes_; }
  const Pools& pools() const { return pools_; }
  TurnLane* Find(uint64_t epoch) const;

  // A lane comes or goes (null: there was none), or workers do. True: pools that nobody has or sees any more were
  // forgotten.
  bool Add(uint64_t epoch, const StagePlan& plan, absl::Time now);
  bool Remove(uint64_t epoch, std::unique_ptr<TurnLane>* lane);
  // Of all workers that are seen, whoever drives them.
  bool SetSeen(const std::vector<std::string>& pools);
  // Turns leave it, and no more come.
  void Close(TurnLane& lane);

  // Another whenever lanes or pools are.
  uint64_t version() const { return version_; }

  // Whether a model's fingerprint is of a pool that is there or may come back.
  bool KnowsModel(const std::string& fingerprint) const;
  // The pool with the most slots to spare that the turn may run in, if any has one.
  const Pool* ChoosePool(const Turn& turn, const PoolUse& active) const;
  // Whether what is served now is what the turn began with, or is about to begin with.
  absl::Status CheckServed(const Turn& turn) const;
  // Whether the turn may be attached there now.
  bool IsOpenTo(const Turn& turn, const TurnLane& lane) const;
  // Some lane has its model.
  bool HasLane(const Turn& turn) const;
  // Where the turn waits least; null: nowhere.
  TurnLane* ChooseLane(const Turn& turn) const;
  void DropWarm(absl::string_view session_id) const;
  int TotalSlots() const;

 private:
  void CountSlots();
  bool DropPools();
  absl::Status CheckLane(const Turn& turn, const TurnLane& lane) const;

  const int max_sequences_;
  Lanes lanes_;
  Pools pools_;
  std::vector<std::string> seen_pools_;
  uint64_t version_ = 1;
};

}  // namespace rwkv::router
