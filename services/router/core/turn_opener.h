// Calls of sessions before anything is computed: the session is taken, and the turn gets its place in the log, or is
// taken up where another router left it (turn_opening.h asks the store). Calls without a slot do their work here.
#pragma once

#include "absl/status/status.h"
#include "services/router/core/client_streams.h"
#include "services/router/core/core_context.h"
#include "services/router/core/placement.h"
#include "services/router/core/session_table.h"
#include "services/router/core/turn.h"
#include "services/router/core/turn_ends.h"
#include "services/router/core/turn_opening.h"
#include "services/router/core/turn_slots.h"
#include "services/router/core/turn_table.h"

namespace rwkv::router {

// Part of the core: one thread at a time. Keeps nothing of its own. Law T2: a request_id runs once.
class TurnOpener {
 public:
  // All borrowed.
  TurnOpener(const CoreContext& context, const Placement& placement, SessionTable* sessions, ClientStreams* streams,
             TurnSlots* slots, TurnEnds* ends);

  // Of a turn that has its session and a pool; parked when it is open, or at its end.
  void Open(const TurnPtr& turn) const;
  // Of a call that takes no slot: its job, under the lease of its session.
  void RunExclusive(const TurnPtr& turn) const;

 private:
  OpeningRequest RequestOf(const Turn& turn) const;
  void OnOpened(const TurnPtr& turn, const Opened& opened) const;
  void OnExclusive(Turn& turn, const Opened& opened) const;
  // A call that names no model means the session's.
  void ChooseModelOf(const Session& session, Turn& turn) const;
  // Takes over what the log says of the turn.
  static absl::Status TakeUp(Turn& turn, const Opened& opened);
  void FailForRoom(Turn& turn) const;

  const CoreContext& context_;
  const Placement& placement_;
  SessionTable* const sessions_;
  ClientStreams* const streams_;
  TurnSlots* const slots_;
  TurnEnds* const ends_;
};

}  // namespace rwkv::router
