// Calls as they come: joined to their turn if that runs here already, refused, put in the line, or started; and those
// of the line that are started when there is room, or have waited for too long.
#pragma once

#include "absl/status/status.h"
#include "services/router/core/client_streams.h"
#include "services/router/core/core_context.h"
#include "services/router/core/placement.h"
#include "services/router/core/session_table.h"
#include "services/router/core/turn.h"
#include "services/router/core/turn_ends.h"
#include "services/router/core/turn_opener.h"
#include "services/router/core/turn_slots.h"
#include "services/router/core/turn_table.h"
#include "services/router/core/waiting_line.h"

namespace rwkv::router {

// Part of the core: one thread at a time. Law T2: a session has one turn at a time. B1: who does not fit is refused,
// and is told when to come back.
class Arrivals {
 public:
  // All borrowed.
  Arrivals(const CoreContext& context, const Placement& placement, const TurnOpener& opener, TurnTable* turns,
           SessionTable* sessions, WaitingLine* line, ClientStreams* streams, TurnSlots* slots, TurnEnds* ends);

  void Arrive(const TurnPtr& turn) const;
  // Those of the line for which there is room, in their order.
  void StartWaiting() const;
  void RefuseOverdue() const;

 private:
  // Whether the session of the call lets it in; if not, the call has been joined or refused.
  bool MeetSession(const TurnPtr& turn) const;
  // A later call of the turn `live`, which goes on with it as its client.
  void Join(const TurnPtr& live, Turn& call) const;
  void Refuse(Turn& call, const absl::Status& status) const { streams_->Close(call, status); }
  absl::Status WhyNoLane(const Turn& call) const;
  // A full line makes room for a tenant that has less of it than another, at the cost of that one's last.
  bool MakeRoom(const Turn& newcomer) const;
  void Start(const TurnPtr& turn) const;

  const CoreContext& context_;
  const Placement& placement_;
  const TurnOpener& opener_;
  TurnTable* const turns_;
  SessionTable* const sessions_;
  WaitingLine* const line_;
  ClientStreams* const streams_;
  TurnSlots* const slots_;
  TurnEnds* const ends_;
};

}  // namespace rwkv::router
