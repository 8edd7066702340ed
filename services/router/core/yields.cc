#include "services/router/core/yields.h"

#include <algorithm>

#include "absl/strings/string_view.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

}  // namespace

Yields::Yields(const CoreContext& context, const TurnTable& turns, const WaitingLine& line, const Placement& placement,
               const Saves& saves, const TurnSlots& slots)
    : context_(context), turns_(turns), line_(line), placement_(placement), saves_(saves), slots_(slots) {}

void Yields::Look(const Turn& turn) {
  // Each time it has a slot it gets further than before, whatever became of its snapshots.
  const bool could = turn.phase() == Phase::kRunning && !turn.yielding() && TurnSlots::CanYield(turn) &&
                     !turn.tail_pending && turn.patience.furthest() > turn.progress_at_slot;
  holders_version_ += could ? holders_.insert(turn.id).second : holders_.erase(turn.id) > 0;
}

void Yields::Sweep() {
  if (line_.empty() || placement_.lanes().empty()) return;
  int saves = saves_.room() - turns_.tally().yielding();
  const Version version = {line_.version(), holders_version_, saves};
  if (chosen_at_ == version && context_.Now() < choose_again_) return;
  chosen_at_ = version;
  choose_again_ = absl::InfiniteFuture();
  const auto weight = [this](absl::string_view tenant) { return context_.WeightOf(tenant); };
  for (const auto& [pool, demand] : Demand(&choose_again_)) {
    for (const uint64_t id : ChooseYields(demand, saves, weight, context_.options.slot_quantum, context_.Now())) {
      slots_.BeginYield(*turns_.Find(id));
      --saves;
    }
  }
}

std::map<std::string, SlotDemand> Yields::Demand(absl::Time* until) const {
  const absl::Time now = context_.Now();
  const auto changes_at = [now, until](absl::Time when) {
    if (when > now) *until = std::min(*until, when);
  };
  std::map<std::string, SlotDemand> demands;
  for (const uint64_t id : holders_) {
    const Turn& turn = *turns_.running().at(id);
    demands[turn.pool()].holders.push_back({id, turn.slot_since, turn.tenant});
    changes_at(turn.slot_since + context_.options.slot_quantum);
  }
  if (demands.empty()) return demands;
  const TurnTally& tally = turns_.tally();
  for (auto& [name, demand] : demands) {
    demand.held = tally.held(name);
    demand.coming = tally.yielding(name);
    const auto pool = placement_.pools().find(name);
    if (pool != placement_.pools().end()) demand.coming += std::max(0, pool->second.slots - tally.active(name));
  }
  for (const TurnPtr& turn : line_.turns()) {
    if (!turn->kind->takes_slot()) continue;
    const absl::Time free_at = line_.FreeAt(*turn);
    changes_at(free_at);
    if (free_at > now) continue;
    const auto demand = std::find_if(demands.begin(), demands.end(),
                                     [this, &turn](const auto& one) { return IsServedBy(*turn, one.first); });
    if (demand != demands.end()) demand->second.line.push_back(turn->tenant);
  }
  return demands;
}

bool Yields::IsServedBy(const Turn& turn, const std::string& pool) const {
  if (!turn.pool().empty()) return turn.pool() == pool;
  // Whoever has no pool yet takes a slot wherever one comes free.
  const auto found = placement_.pools().find(pool);
  return found != placement_.pools().end() && found->second.model.fingerprint() == turn.model->info.fingerprint();
}

}  // namespace rwkv::router
