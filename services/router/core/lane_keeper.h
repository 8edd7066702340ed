// Lanes come, go, are given away, or hang, and what becomes of the turns that are in them.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "services/router/core/core_context.h"
#include "services/router/core/placement.h"
#include "services/router/core/saves.h"
#include "services/router/core/turn.h"
#include "services/router/core/turn_ends.h"
#include "services/router/core/turn_options.h"
#include "services/router/core/turn_slots.h"
#include "services/router/core/turn_table.h"
#include "services/router/pipeline/stage_plan.h"

namespace rwkv::router {

// Part of the core: one thread at a time, but for what says otherwise. Law T3: a lost lane changes no token.
class LaneKeeper {
 public:
  // All borrowed.
  LaneKeeper(const CoreContext& context, const TurnTable& turns, Placement* placement, Saves* saves, TurnSlots* slots,
             TurnEnds* ends);

  // Some lane is up. Any thread.
  bool serving() const { return serving_.load(); }
  std::vector<LaneState> Lanes() const;

  void Up(uint64_t epoch, const StagePlan& plan);
  // Nothing comes back from it any more: its turns wait for another.
  void Down(uint64_t epoch, const absl::Status& why);
  // It is given away: its turns leave it, then it ends.
  void Close(uint64_t epoch);
  void PoolsSeen(const std::vector<std::string>& pools);

  void SweepClosing() const;
  // Ends lanes whose steps do not come back, or one where a slot is not attached in time.
  void Watch();

 private:
  // A turn that lost its slot with the lane is parked, or at its end.
  void Unseat(Turn& turn, const absl::Status& why) const;
  void WatchSteps() const;
  void WatchAttaches();

  const CoreContext& context_;
  const TurnTable& turns_;
  Placement* const placement_;
  Saves* const saves_;
  TurnSlots* const slots_;
  TurnEnds* const ends_;
  std::atomic<bool> serving_{false};
  absl::Time attaches_seen_ = absl::InfinitePast();  // When those that attach were looked at last,
  absl::Time attaches_due_ = absl::InfinitePast();   // and before this none is late.
};

}  // namespace rwkv::router
