// How a turn leaves its slot: for nothing, warm for whoever goes on from it, or for others that wait until it gets the
// next; and where it waits for that one.
#pragma once

#include <string>

#include "services/router/core/core_context.h"
#include "services/router/core/placement.h"
#include "services/router/core/saves.h"
#include "services/router/core/turn.h"
#include "services/router/core/turn_table.h"
#include "services/router/core/waiting_line.h"

namespace rwkv::router {

// Part of the core: one thread at a time. Keeps nothing of its own. Where it says `turn` is in a scheduler, it has to
// be; nothing of it is in flight when it is retired or yields.
class TurnSlots {
 public:
  // All borrowed.
  TurnSlots(const CoreContext& context, const Placement& placement, TurnTable* turns, WaitingLine* line, Saves* saves);

  // Waits for a lane, or for whatever it has to wait for before it looks for a slot; at its end if it was stopped.
  void Park(Turn& turn) const;
  // Its slot is another's, or nobody's, from now on. Its phase is for who calls.
  void Leave(Turn& turn);
  // It needs no slot any more, and what is in it is of no use.
  void Remove(Turn& turn);
  // It needs no slot any more: saved if that is not done, what is in it stays warm. In a scheduler, with a session.
  void Retire(Turn& turn);

  // A turn whose answer can pause.
  static bool CanYield(const Turn& turn);
  // It gives its slot away as soon as nothing of it is in flight. In a scheduler.
  void BeginYield(Turn& turn) const;
  // That is now: saved if that is not done, to the end of the line. In a scheduler.
  void Yield(const TurnPtr& turn);
  // More turns than slots are left in its pool, where lanes were lost: then it waits first in the line.
  bool HasNoPlace(const Turn& turn) const;
  void WaitForPlace(const TurnPtr& turn);

  // The state that a turn without a session left behind is not needed any more.
  void DropOwn(Turn& turn);

  // The slot of a turn that yielded is warm under these two names.
  static std::string WarmSession(const Turn& turn);
  static std::string WarmBranch(const Turn& turn);

 private:
  const CoreContext& context_;
  const Placement& placement_;
  TurnTable* const turns_;
  WaitingLine* const line_;
  Saves* const saves_;
};

}  // namespace rwkv::router
