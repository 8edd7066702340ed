// The line: calls that wait to be started, and turns that gave their slot away, or lost it and found no other. Who of
// them may start, in which order - fairly between tenants, as ../scheduler/fair_slots.h has it -, and who leaves a full
// line. What does not change who may start costs no look at the line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "services/router/core/core_context.h"
#include "services/router/core/placement.h"
#include "services/router/core/session_table.h"
#include "services/router/core/turn.h"
#include "services/router/core/turn_lane.h"
#include "services/router/core/turn_table.h"
#include "services/router/scheduler/kept_slots.h"

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
  // A copy, the longest waiting first.
  std::vector<TurnPtr> turns() const;

  // Those that were started, and are not in the line.
  size_t running() const { return turns_.running().size() - yielded_; }
  // As many as may.
  bool RunsMost() const { return running() >= static_cast<size_t>(context_.options.max_running); }
  // Whether there is room for the turn while `active` turns have a part of the slots, and its session lets it start.
  bool Fits(const Turn& turn, const PoolUse& active) const;
  bool SessionFree(const Turn& turn) const { return FreeAt(turn) <= context_.Now(); }
  bool CanStart(const Turn& turn) const { return Fits(turn, turns_.tally().active()) && SessionFree(turn); }
  // When its session lets the turn start, unless something happens to that: in the past, in time, or never.
  absl::Time FreeAt(const Turn& turn) const;

  // Those for which there is room leave the line, in the order in which they should get it, and are given to `start`.
  // Nobody else leaves or joins the line meanwhile.
  void OfferRoom(absl::FunctionRef<void(const TurnPtr&)> start);
  // Another whenever what the line says may be.
  using Version = std::tuple<uint64_t, uint64_t, uint64_t, uint64_t>;
  Version version() const { return {turns_.tally().version(), placement_.version(), sessions_.version(), version_}; }
  // The line is looked at as if it were new.
  void Forget() { ++version_; }

  // At the end, in phase kWaiting or kYielded, which it stays in.
  void Add(const TurnPtr& turn);
  // In phase kYielded, without a slot since its lane was lost: behind its like and before all others, so that others
  // yield to them, and whatever lane comes up has them.
  void AddLost(const TurnPtr& turn);
  // False, and nothing happens: it is not in the line. The line may be the last that holds it.
  bool Remove(const Turn& turn);

  // Who goes so that `newcomer` gets into a full line: the last of the tenant that has most of it for its weight, if
  // that is more than the newcomer's would have.
  struct Leaver {
    TurnPtr turn;
    int waiting = 0;  // Of its tenant, with itself.
  };
  absl::optional<Leaver> ChooseLeaver(const Turn& newcomer) const;
  // Calls that have waited to be started for longer than anybody is to.
  std::vector<TurnPtr> Overdue();

  // The turn is over and has left its slot, which waits for the tenant's next one if others would take it and the
  // tenant has no more than its share.
  void KeepSlot(const Turn& turn);
  // A turn of the tenant gets a slot of the pool.
  void UseKept(const Turn& turn) { version_ += kept_.Use(turn.pool(), turn.tenant); }
  void ExpireKept() { version_ += kept_.Expire(context_.Now()); }

 private:
  using Place = std::pair<int, uint64_t>;  // 0: its lane was lost; then as they came.
  using Line = std::map<Place, TurnPtr>;
  struct Group;  // What is left of a tenant's part while room is offered.

  void Insert(int rank, const TurnPtr& turn);
  bool IsKnown(const Turn& turn) const;
  // Those that start though there is no slot: all that they do needs none, or their model is gone.
  bool SomeNeedNoSlot();
  // Whether there is a slot that turns of the tenant may have.
  bool HasSlotFor(const std::string& tenant) const;
  std::vector<Group> Groups(bool all);

  const CoreContext& context_;
  const TurnTable& turns_;
  const Placement& placement_;
  const SessionTable& sessions_;
  Line line_;
  std::map<std::string, Line> of_tenant_;  // The same; none is empty.
  absl::flat_hash_map<const Turn*, Place> places_;
  uint64_t next_place_ = 0;
  size_t yielded_ = 0;    // Of these, in phase kYielded: they are among turns_.running().
  int64_t slotless_ = 0;  // Take no slot.
  int64_t homeless_ = 0;  // Whose model or pool is gone, as of known_version_.
  uint64_t known_version_ = 0;
  KeptSlots kept_;
  uint64_t version_ = 0;
  absl::optional<Version> offered_;                 // Nobody could start then,
  absl::Time offer_again_;                          // and before this nobody can unless something changes.
  absl::Time overdue_at_ = absl::InfiniteFuture();  // Before it nobody is.
};

}  // namespace rwkv::router
