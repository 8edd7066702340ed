// The line: calls that wait to be started, and turns that gave their slot away, or lost it and found no other. Who of
// them may start, in which order - fairly between tenants (../scheduler/fair_slots.h) -, and who leaves a full line.
#pragma once

#include <cstddef>
#include <deque>
#include <vector>

#include "absl/types/optional.h"
#include "services/router/scheduler/kept_slots.h"
#include "services/router/turns/core_context.h"
#include "services/router/turns/placement.h"
#include "services/router/turns/session_table.h"
#include "services/router/turns/turn.h"
#include "services/router/turns/turn_lane.h"
#include "services/router/turns/turn_table.h"

namespace rwkv::router {

// Part of the core: one thread at a time. Decides, and starts or ends nobody: that is for who asks.
class WaitingLine {
 public:
  // All borrowed, and only looked at.
  WaitingLine(const CoreContext& context, const TurnTable& turns, const Placement& placement,
              const SessionTable& sessions);

  bool empty() const { return line_.empty(); }
  size_t size() const { return line_.size(); }
  bool full() const { return static_cast<int>(line_.size()) >= context_.options.max_waiting; }
  const std::deque<TurnPtr>& turns() const { return line_; }

  // Those that were started, and are not in the line.
  size_t running() const { return turns_.running().size() - yielded_; }
  // As many as may.
  bool RunsMost() const { return running() >= static_cast<size_t>(context_.options.max_running); }
  // Whether there is room for the turn while `active` turns have a part of the slots, and its session lets it start.
  bool Fits(const Turn& turn, const PoolUse& active) const;
  bool SessionFree(const Turn& turn) const;
  bool CanStart(const Turn& turn) const { return Fits(turn, turns_.ActiveByPool()) && SessionFree(turn); }
  // All of the line as they should get what is free.
  std::vector<TurnPtr> Order() const;

  // At the end, in phase kWaiting or kYielded, which it stays in.
  void Add(const TurnPtr& turn);
  // In phase kYielded, without a slot since its lane was lost: behind its like and before all others, so that others
  // yield to them, and whatever lane comes up has them.
  void AddLost(const TurnPtr& turn);
  // Does nothing if it is not in the line. The line may be the last that holds it.
  void Remove(const Turn& turn);
  // To be started now. False: it has left the line.
  bool Take(const TurnPtr& turn);

  // Who goes so that `newcomer` gets into a full line: the last of the tenant that has most of it for its weight, if
  // that is more than the newcomer's would have.
  struct Leaver {
    TurnPtr turn;
    int waiting = 0;  // Of its tenant, with itself.
  };
  absl::optional<Leaver> ChooseLeaver(const Turn& newcomer) const;
  // Calls that have waited to be started for longer than anybody is to.
  std::vector<TurnPtr> Overdue() const;

  // The turn is over and has left its slot, which waits for the tenant's next one if others would take it and the
  // tenant has no more than its share.
  void KeepSlot(const Turn& turn);
  // A turn of the tenant gets a slot of the pool.
  void UseKept(const Turn& turn) { kept_.Use(turn.pool, turn.tenant); }
  void ExpireKept() { kept_.Expire(context_.Now()); }

 private:
  const CoreContext& context_;
  const TurnTable& turns_;
  const Placement& placement_;
  const SessionTable& sessions_;
  std::deque<TurnPtr> line_;
  size_t yielded_ = 0;  // Of these, in phase kYielded: they are among turns_.running().
  KeptSlots kept_;
};

}  // namespace rwkv::router
