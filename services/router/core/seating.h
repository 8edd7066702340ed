// The way of a parked turn to its slot: it waits for a lane that it may run on, then for the answer where its state is
// - in a warm slot, in a snapshot, in the prefix cache, or nowhere -, and is attached there.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>

#include "absl/time/time.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/router/core/attaching.h"
#include "services/router/core/client_streams.h"
#include "services/router/core/core_context.h"
#include "services/router/core/placement.h"
#include "services/router/core/prefixes.h"
#include "services/router/core/turn.h"
#include "services/router/core/turn_ends.h"
#include "services/router/core/turn_slots.h"
#include "services/router/core/turn_table.h"

namespace rwkv::router {

// Part of the core: one thread at a time.
class Seating {
 public:
  // All borrowed.
  Seating(const CoreContext& context, const Placement& placement, const Attaching& attaching, Prefixes* prefixes,
          ClientStreams* streams, TurnSlots* slots, TurnEnds* ends);

  // What a turn in phase kParked does next: looks for its slot, waits, or gives up.
  void Advance(const TurnPtr& turn) const;
  // After its sweep, of any turn: when it may do something else though nothing happens to it.
  absl::Time LookAgain(const Turn& turn);
  // Turns without a lane are looked at if another router has one for them, which nobody tells of.
  void TouchStranded(const TurnTable& turns) const;

 private:
  void Locate(const TurnPtr& turn) const;
  // Takes a warm slot at a position in [at_least, at_most], if there is one.
  bool LocateWarm(const TurnPtr& turn, uint64_t at_least, uint64_t at_most) const;
  // The log grew without the turn's slot, which stands at `position`: what it has not seen is read while it attaches.
  void ReadTail(const TurnPtr& turn, uint64_t position) const;
  // Of a turn with a session: asks the store.
  void LocateSnapshot(const TurnPtr& turn, absl::optional<v1::FindPrefixRequest> prefix) const;
  // Of a turn that has nothing else to begin from.
  void LocatePrefix(const TurnPtr& turn, v1::FindPrefixRequest find) const;
  void OnLocated(const TurnPtr& turn, Located located) const;
  // The store cannot be asked now: too much waits for it.
  void TryLater(Turn& turn) const;
  // Another router may go on with it.
  bool IsStranded(const Turn& turn) const;
  // What it left behind when it gave its slot away is on its way to where it is looked for.
  bool AwaitsSave(const Turn& turn) const;

  const CoreContext& context_;
  const Placement& placement_;
  const Attaching& attaching_;
  Prefixes* const prefixes_;
  ClientStreams* const streams_;
  TurnSlots* const slots_;
  TurnEnds* const ends_;
  std::map<std::string, std::set<uint64_t>> stranded_;  // By pool: that would go on elsewhere. None is empty.
};

}  // namespace rwkv::router
