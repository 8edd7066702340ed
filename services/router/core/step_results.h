// What comes back from a lane's workers for turns that run: results of steps, tokens, logits, and where a sequence
// stopped.
#pragma once

#include "absl/status/status.h"
#include "rwkv/v1/worker.pb.h"
#include "services/router/core/core_context.h"
#include "services/router/core/load_gauges.h"
#include "services/router/core/turn.h"
#include "services/router/core/turn_ends.h"
#include "services/router/core/turn_lane.h"
#include "services/router/core/turn_slots.h"
#include "services/router/core/turn_table.h"

namespace rwkv::router {

// Part of the core: one thread at a time. Keeps nothing of its own. Law S4: every position is checked against what was
// sent. What belongs to a sequence that is not there any more is dropped.
class StepResults {
 public:
  // All borrowed.
  StepResults(const CoreContext& context, const TurnTable& turns, TurnSlots* slots, TurnEnds* ends, LoadGauges* gauges)
      : context_(context), turns_(turns), slots_(slots), ends_(ends), gauges_(gauges) {}

  void OnStep(TurnLane& lane, const v1::StepResult& result) const;
  void OnLogits(const v1::LogitsRows& rows) const;
  void OnStopped(const v1::SequenceStopped& stopped) const;

 private:
  void OnEntry(Turn& turn, const v1::EntryResult& result) const;
  void OnToken(Turn& turn, const v1::EntryResult& result) const;
  // The slot is given up, and the turn tried again in another, or at its end.
  void OnFailed(Turn& turn, const absl::Status& status) const;

  const CoreContext& context_;
  const TurnTable& turns_;
  TurnSlots* const slots_;
  TurnEnds* const ends_;
  LoadGauges* const gauges_;
};

}  // namespace rwkv::router
