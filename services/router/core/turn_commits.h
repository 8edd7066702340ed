// What of the turns gets into the log, and what becomes of a turn that cannot be written any more.
#pragma once

#include <cstdint>
#include <set>
#include <vector>

#include "absl/time/time.h"
#include "services/router/core/core_context.h"
#include "services/router/core/log_writer.h"
#include "services/router/core/placement.h"
#include "services/router/core/saves.h"
#include "services/router/core/session_table.h"
#include "services/router/core/turn.h"
#include "services/router/core/turn_ends.h"
#include "services/router/core/turn_slots.h"
#include "services/router/core/turn_table.h"

namespace rwkv::router {

// Part of the core: one thread at a time. Owns the log's writer.
class TurnCommits {
 public:
  // All borrowed.
  TurnCommits(const CoreContext& context, const TurnTable& turns, const Placement& placement, Saves* saves,
              TurnSlots* slots, TurnEnds* ends);

  // The turn may have changed: whether it has something for the log is looked at.
  void Look(const Turn& turn);
  // Begins the next commit, of all turns that have something for it, if none is on its way.
  void Sweep();
  // Another router has the session; what is not in the log is not this one's to write any more.
  void OnLeaseLost(Session& session) const;

 private:
  void OnCommitted(const std::vector<LogWriter::Item>& items, absl::Duration took) const;
  // What is not in the log has never been: neither slot nor snapshot may hold it.
  void OnFailed(Turn& turn, const absl::Status& status) const;

  const CoreContext& context_;
  const TurnTable& turns_;
  const Placement& placement_;
  Saves* const saves_;
  TurnSlots* const slots_;
  TurnEnds* const ends_;
  LogWriter writer_;
  std::set<uint64_t> uncommitted_;  // Turns of which something is on its way to the log, or still to come there.
};

}  // namespace rwkv::router
