// Sequences that decode without being asked for each token. The worker feeds what it draws by itself, as far as the
// router said; results come as from any step. What the turn knows holds all the same: nothing is shown before it is
// durable, a snapshot is taken where the slot is known to be, and every position is checked as it comes.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "rwkv/v1/worker.pb.h"
#include "services/router/core/core_context.h"
#include "services/router/core/saves.h"
#include "services/router/core/turn.h"

namespace rwkv::router {

// Part of the core: one thread at a time. Where a turn stands with its worker is in Turn::going_on.
class GoingOn {
 public:
  // Both borrowed.
  GoingOn(const CoreContext& context, Saves* saves) : context_(context), saves_(saves) {}

  // Whether its worker may feed what it draws by itself.
  static bool MayBegin(const Turn& turn);
  // With the entry that draws its first token here.
  void Begin(Turn& turn, v1::StepEntry* entry) const;
  // Lets the worker go further in time, and saves the turn where it stands when that is due. `idle`: all that it was
  // fed has come back.
  void Advance(Turn& turn, bool idle) const;

  // It stops within two steps, and Stopped() follows.
  static void Halt(Turn& turn);
  // The worker says that it stopped at `position`. kInternal: it was not told to, or that cannot be.
  static absl::Status Stopped(Turn& turn, uint64_t position);
  // A result came: it stands still if that is the last before where it stopped.
  static void Settle(Turn& turn);
  // A token came that may have ended the answer: whether its worker has seen that, too. False: its slot goes beyond the
  // answer, and is of no use to anybody.
  static bool FollowStop(Turn& turn, uint32_t token_id);

 private:
  // Up to which position, the commands so far included.
  uint64_t Limit(const Turn& turn) const;
  // The worker goes no further than what has come back.
  static void StandStill(Turn& turn);

  const CoreContext& context_;
  Saves* const saves_;
};

}  // namespace rwkv::router
