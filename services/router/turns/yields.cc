#include "services/router/turns/yields.h"

#include <algorithm>

#include "absl/strings/string_view.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

}  // namespace

Yields::Yields(const CoreContext& context, const TurnTable& turns, const WaitingLine& line, const Placement& placement,
               const Saves& saves, const TurnSlots& slots)
    : context_(context), turns_(turns), line_(line), placement_(placement), saves_(saves), slots_(slots) {}

void Yields::Sweep() const {
  if (line_.empty() || placement_.lanes().empty()) return;
  const std::map<std::string, SlotDemand> demands = Demand();
  if (demands.empty()) return;
  const TurnTable::Running& running = turns_.running();
  const auto yielding =
      std::count_if(running.begin(), running.end(), [](const auto& it) { return it.second->yielding; });
  int saves = saves_.room() - static_cast<int>(yielding);
  const auto weight = [this](absl::string_view tenant) { return context_.WeightOf(tenant); };
  for (const auto& [pool, demand] : demands) {
    for (const uint64_t id : ChooseYields(demand, saves, weight, context_.options.slot_quantum, context_.Now())) {
      slots_.BeginYield(*turns_.Find(id));
      --saves;
    }
  }
}

std::map<std::string, SlotDemand> Yields::Demand() const {
  std::map<std::string, SlotDemand> demands;
  for (const auto& [id, turn] : turns_.running()) {
    if (turn->phase != Phase::kRunning || turn->yielding || !TurnSlots::CanYield(*turn)) continue;
    // Each time it has a slot it gets further than before, whatever became of its snapshots.
    if (turn->tail_pending || turn->patience.furthest() <= turn->progress_at_slot) continue;
    demands[turn->pool].holders.push_back({id, turn->slot_since, turn->tenant});
  }
  if (demands.empty()) return demands;
  const PoolUse active = turns_.ActiveByPool();
  for (auto& [name, demand] : demands) {
    demand.held = turns_.HeldByTenant(name);
    for (const auto& [id, turn] : turns_.running()) demand.coming += turn->yielding && turn->pool == name;
    const auto pool = placement_.pools().find(name);
    const auto used = active.find(name);
    if (pool == placement_.pools().end()) continue;
    demand.coming += std::max(0, pool->second.slots - (used == active.end() ? 0 : used->second));
  }
  for (const TurnPtr& turn : line_.turns()) {
    if (!turn->kind->takes_slot() || !line_.SessionFree(*turn)) continue;
    const auto demand = std::find_if(demands.begin(), demands.end(),
                                     [this, &turn](const auto& one) { return IsServedBy(*turn, one.first); });
    if (demand != demands.end()) demand->second.line.push_back(turn->tenant);
  }
  return demands;
}

bool Yields::IsServedBy(const Turn& turn, const std::string& pool) const {
  if (!turn.pool.empty()) return turn.pool == pool;
  // Whoever has no pool yet takes a slot wherever one comes free.
  const auto found = placement_.pools().find(pool);
  return found != placement_.pools().end() && found->second.model.fingerprint() == turn.model->info.fingerprint();
}

}  // namespace rwkv::router
