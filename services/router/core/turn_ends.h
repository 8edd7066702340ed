// How turns end other than by their answer: they fail, are refused for good, or are left to themselves by their client.
#pragma once

#include "absl/status/status.h"
#include "services/router/core/client_streams.h"
#include "services/router/core/session_table.h"
#include "services/router/core/turn.h"
#include "services/router/core/turn_slots.h"
#include "services/router/core/waiting_line.h"

namespace rwkv::router {

// Part of the core: one thread at a time. Keeps nothing of its own. Any turn, in any phase; a second end of the same
// turn does nothing.
class TurnEnds {
 public:
  // All borrowed.
  TurnEnds(ClientStreams* streams, TurnSlots* slots, WaitingLine* line, SessionTable* sessions)
      : streams_(streams), slots_(slots), line_(line), sessions_(sessions) {}

  // The client is told, and nothing more is generated. The log keeps the turn open: it may go on later.
  void Fail(Turn& turn, const absl::Status& status);
  // It cannot go on, now or ever: that is its end, in the log too. In no scheduler.
  void Refuse(Turn& turn, const absl::Status& status);
  // Nothing more is generated, and the log keeps the turn open.
  void Abandon(Turn& turn);

 private:
  ClientStreams* const streams_;
  TurnSlots* const slots_;
  WaitingLine* const line_;
  SessionTable* const sessions_;
};

}  // namespace rwkv::router
