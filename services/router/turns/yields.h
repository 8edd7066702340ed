// Turns give their slots away while others wait: what each pool has for those in the line is gathered here, and who is
// chosen (yield_choice.h) begins to yield.
#pragma once

#include <map>
#include <string>

#include "services/router/turns/core_context.h"
#include "services/router/turns/placement.h"
#include "services/router/turns/saves.h"
#include "services/router/turns/turn.h"
#include "services/router/turns/turn_slots.h"
#include "services/router/turns/turn_table.h"
#include "services/router/turns/waiting_line.h"
#include "services/router/turns/yield_choice.h"

namespace rwkv::router {

// Part of the core: one thread at a time. Keeps nothing of its own: who yields is in Turn::yielding.
class Yields {
 public:
  // All borrowed.
  Yields(const CoreContext& context, const TurnTable& turns, const WaitingLine& line, const Placement& placement,
         const Saves& saves, const TurnSlots& slots);

  // Costs nothing while nobody waits.
  void Sweep() const;

 private:
  // By pool; of those in which anybody could give a slot away.
  std::map<std::string, SlotDemand> Demand() const;
  // Whether the turn takes a slot of the pool.
  bool IsServedBy(const Turn& turn, const std::string& pool) const;

  const CoreContext& context_;
  const TurnTable& turns_;
  const WaitingLine& line_;
  const Placement& placement_;
  const Saves& saves_;
  const TurnSlots& slots_;
};

}  // namespace rwkv::router
