// Turns give their slots away while others wait: what each pool has for those in the line is gathered here, and who is
// chosen (yield_choice.h) begins to yield.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <tuple>

#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "services/router/core/core_context.h"
#include "services/router/core/placement.h"
#include "services/router/core/saves.h"
#include "services/router/core/turn.h"
#include "services/router/core/turn_slots.h"
#include "services/router/core/turn_table.h"
#include "services/router/core/waiting_line.h"
#include "services/router/core/yield_choice.h"

namespace rwkv::router {

// Part of the core: one thread at a time. Who yields is in Turn::yielding.
class Yields {
 public:
  // All borrowed.
  Yields(const CoreContext& context, const TurnTable& turns, const WaitingLine& line, const Placement& placement,
         const Saves& saves, const TurnSlots& slots);

  // The turn may have changed: whether it could give its slot away is looked at.
  void Look(const Turn& turn);
  // Costs nothing while nobody waits, and little while nothing changes of what it depends on.
  void Sweep();

 private:
  // All that the choice depends on, but for the time: what the line does, who could yield, how many may be saved.
  using Version = std::tuple<WaitingLine::Version, uint64_t, int>;

  // By pool; of those in which anybody could give a slot away. Says when it may be another by itself.
  std::map<std::string, SlotDemand> Demand(absl::Time* until) const;
  // Whether the turn takes a slot of the pool.
  bool IsServedBy(const Turn& turn, const std::string& pool) const;

  const CoreContext& context_;
  const TurnTable& turns_;
  const WaitingLine& line_;
  const Placement& placement_;
  const Saves& saves_;
  const TurnSlots& slots_;
  std::set<uint64_t> holders_;  // Could give their slots away.
  uint64_t holders_version_ = 0;
  absl::optional<Version> chosen_at_;
  absl::Time choose_again_;  // At the latest.
};

}  // namespace rwkv::router
