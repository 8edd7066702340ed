// What goes to clients: the messages of a turn as its tokens may be shown, the end of its call, and who reads too
// slowly for the slot that it holds.
#pragma once

#include <cstddef>

#include "absl/status/status.h"
#include "rwkv/v1/generation.pb.h"
#include "services/router/core/core_context.h"
#include "services/router/core/turn.h"
#include "services/router/core/turn_table.h"

namespace rwkv::router {

// Part of the core: one thread at a time, but for what says otherwise. Law T1: nothing is sent of a turn with a log
// that is not durable. Keeps nothing of its own: how far a turn's client is stands in the turn.
class ClientStreams {
 public:
  // Both borrowed. The table forgets calls that end.
  ClientStreams(const CoreContext& context, TurnTable* turns) : context_(context), turns_(turns) {}

  // Sends what of the turn is ready, while its client takes it, and ends the call of one that has been told all.
  // kResourceExhausted: the client takes nothing for too long; the turn is to fail with it.
  absl::Status Pump(Turn& turn);
  // Of a call that generates nothing: whether its client takes a message more, with so many of them in its stream.
  bool HasRoom(Turn& turn, size_t queued);
  // Of one whose stream has just turned out to be full: the client has taken nothing for too long.
  bool IsStuck(const Turn& turn) const;
  // When that begins if the client goes on to take nothing; InfiniteFuture: its stream is not full.
  absl::Time StuckAt(const Turn& turn) const { return turn.stalled_since + context_.options.slow_client_timeout; }

  // The call ends for its client; the turn may go on closing.
  void End(Turn& turn, const absl::Status& status);
  // The same for a call that nobody else knows of. Any thread.
  void Close(Turn& turn, const absl::Status& status) const;

 private:
  // Too many messages wait: says since when that stands still.
  void Stall(Turn& turn, size_t queued);
  // Whether `limit` messages are in the turn's stream; then the core hears when there are fewer.
  bool IsFull(Turn& turn, size_t limit);
  absl::Status StuckStatus(const Turn& turn) const;
  v1::GenerateResponse FinishMessage(const Turn& turn) const;
  void Observe(const Turn& turn) const;  // One that ended well.

  const CoreContext& context_;
  TurnTable* const turns_;
};

}  // namespace rwkv::router
