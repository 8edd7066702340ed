// What a turn in a slot does next: is fed, goes on, is saved, gives its slot away, or is over. It follows from what the
// turn is, not from which event came last.
#pragma once

#include "absl/status/status.h"
#include "services/router/core/client_streams.h"
#include "services/router/core/core_context.h"
#include "services/router/core/going_on.h"
#include "services/router/core/saves.h"
#include "services/router/core/turn.h"
#include "services/router/core/turn_ends.h"
#include "services/router/core/turn_slots.h"
#include "services/router/core/turn_table.h"

namespace rwkv::router {

// Part of the core: one thread at a time. Keeps nothing of its own.
class TurnProgress {
 public:
  // All borrowed.
  TurnProgress(const CoreContext& context, const GoingOn& going_on, Saves* saves, ClientStreams* streams,
               TurnSlots* slots, TurnEnds* ends);

  // Of a turn in phase kRunning.
  void Advance(const TurnPtr& turn) const;
  // A snapshot of the turn is over, as Saves::Ended says: what it left behind is its own now, and a call that waits for
  // it has its answer.
  void OnSaveEnded(Turn& turn, const PendingSave& save, bool is_whole, const absl::Status& status) const;

 private:
  // `idle`: all that it was fed has come back.
  void AdvanceGenerate(Turn& turn, bool idle) const;
  void AdvanceOther(Turn& turn, bool idle) const;
  // Saves the state of a prefix if it is there, and feeds what comes behind. False: there is nothing of that to wait
  // for.
  bool FeedPastPrefix(Turn& turn) const;
  // Too much of it is not in the log yet, or not with its client.
  bool Lags(const Turn& turn) const;

  const CoreContext& context_;
  const GoingOn& going_on_;
  Saves* const saves_;
  ClientStreams* const streams_;
  TurnSlots* const slots_;
  TurnEnds* const ends_;
};

}  // namespace rwkv::router
