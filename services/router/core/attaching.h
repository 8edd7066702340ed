// Slots being made ready: a turn is admitted to a lane's scheduler with what it begins from, and every stage attaches
// that, or says why it cannot.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "rwkv/v1/worker.pb.h"
#include "services/router/core/core_context.h"
#include "services/router/core/placement.h"
#include "services/router/core/prefixes.h"
#include "services/router/core/turn.h"
#include "services/router/core/turn_ends.h"
#include "services/router/core/turn_lane.h"
#include "services/router/core/turn_slots.h"
#include "services/router/core/turn_table.h"
#include "services/router/scheduler/scheduler.h"

namespace rwkv::router {

// Part of the core: one thread at a time. Keeps nothing of its own. Law S4: a turn is fed from where its slot stands.
class Attaching {
 public:
  // All borrowed.
  Attaching(const CoreContext& context, const Placement& placement, TurnTable* turns, Prefixes* prefixes,
            TurnSlots* slots, TurnEnds* ends);

  // From turn->snapshot or from nothing, at `position`, in the lane where it waits least; fed what is known. Parked if
  // there is no lane.
  void Admit(const TurnPtr& turn, uint64_t position) const;
  // From a warm slot of `lane`. False: it is gone, and nothing has happened. Feeding is for who calls.
  bool AdmitWarm(const TurnPtr& turn, TurnLane& lane, const Scheduler::WarmSlot& warm) const;
  // One stage's answer.
  void OnAnswer(const v1::SequenceAttached& attached) const;

 private:
  void Begin(const TurnPtr& turn, TurnLane& lane, uint64_t position) const;
  void OnAttached(Turn& turn) const;
  void OnFailed(Turn& turn, const absl::Status& status) const;
  // Of its session. An older one is taken, or none.
  void OnSnapshotUnusable(Turn& turn, const absl::Status& why) const;

  const CoreContext& context_;
  const Placement& placement_;
  TurnTable* const turns_;
  Prefixes* const prefixes_;
  TurnSlots* const slots_;
  TurnEnds* const ends_;
};

}  // namespace rwkv::router
