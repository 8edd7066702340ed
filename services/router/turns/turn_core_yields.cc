// Slots that turns give away, so that others that wait get one.
#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "services/router/scheduler/fair_slots.h"
#include "services/router/turns/turn_core.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

// `coming` slots go to those of `line` that are next. They have no need of another.
void GiveComing(int coming, TenantWeight weight, std::map<std::string, int>* held, std::vector<std::string>* line) {
  const std::vector<size_t> order = FairOrder(*held, *line, weight);
  std::vector<std::string> others;
  for (size_t i = 0; i < order.size(); ++i) {
    const std::string& tenant = (*line)[order[i]];
    if (i < static_cast<size_t>(coming)) {
      ++(*held)[tenant];
    } else {
      others.push_back(tenant);
    }
  }
  *line = std::move(others);
}

// No tenant of those that wait has fewer slots than its share.
bool HaveTheirShare(const std::map<std::string, int>& held, const std::vector<std::string>& line, TenantWeight weight) {
  std::map<std::string, int> demand = held;
  for (const std::string& tenant : line) ++demand[tenant];
  int slots = 0;
  for (const auto& [tenant, count] : held) slots += count;
  const std::map<std::string, int> fair = FairAllocation(slots, demand, weight);
  return std::all_of(fair.begin(), fair.end(), [&held](const auto& share) {
    const auto has = held.find(share.first);
    return share.second <= (has == held.end() ? 0 : has->second);
  });
}

}  // namespace

void TurnCore::SweepYields() {
  if (waiting_.empty() || placement_.lanes().empty()) return;
  const std::map<std::string, PoolDemand> demands = DemandByPool();
  if (demands.empty()) return;
  const auto yielding =
      std::count_if(running_.begin(), running_.end(), [](const auto& it) { return it.second->yielding; });
  int saves = static_cast<int>(kSavesPerSlot * placement_.TotalSlots()) - static_cast<int>(saves_.size()) -
              static_cast<int>(yielding);
  for (const auto& [pool, demand] : demands) {
    for (const uint64_t id : ChooseYields(pool, demand, saves)) {
      BeginYield(*running_.at(id));
      --saves;
    }
  }
}

std::map<std::string, TurnCore::PoolDemand> TurnCore::DemandByPool() const {
  std::map<std::string, PoolDemand> demands;
  for (const auto& [id, turn] : running_) {
    if (turn->phase != Phase::kRunning || turn->yielding || !CanYield(*turn)) continue;
    // Each time it has a slot it gets further than before, whatever became of its snapshots.
    if (turn->tail_pending || turn->patience.furthest() <= turn->progress_at_slot) continue;
    demands[turn->pool].holders.push_back({id, turn->slot_since, turn->tenant});
  }
  if (demands.empty()) return demands;
  const PoolUse active = ActiveByPool();
  for (auto& [name, demand] : demands) {
    for (const auto& [id, turn] : running_) demand.coming += turn->yielding && turn->pool == name;
    const auto pool = placement_.pools().find(name);
    const auto used = active.find(name);
    if (pool == placement_.pools().end()) continue;
    demand.coming += std::max(0, pool->second.slots - (used == active.end() ? 0 : used->second));
  }
  for (const TurnPtr& turn : waiting_) {
    if (!turn->kind->takes_slot() || !SessionFree(*turn)) continue;
    // Whoever has no pool yet takes a slot wherever one comes free.
    const auto serves = [this, &turn](const auto& demand) {
      if (!turn->pool.empty()) return turn->pool == demand.first;
      const auto pool = placement_.pools().find(demand.first);
      return pool != placement_.pools().end() && pool->second.model.fingerprint() == turn->model->info.fingerprint();
    };
    const auto demand = std::find_if(demands.begin(), demands.end(), serves);
    if (demand != demands.end()) demand->second.line.push_back(turn->tenant);
  }
  return demands;
}

std::vector<uint64_t> TurnCore::ChooseYields(const std::string& pool, const PoolDemand& demand, int most) const {
  const auto weight = [this](absl::string_view tenant) { return WeightOf(tenant); };
  std::map<std::string, int> held = HeldByTenant(pool);
  std::vector<std::string> line = demand.line;
  if (demand.coming > 0) GiveComing(demand.coming, weight, &held, &line);
  if (line.empty()) return {};
  // Behind a flood this is asked with every step and every refusal, and mostly nobody is to yield: nobody has had a
  // slot for long, and whoever waits has its share.
  const absl::Time now = Now();
  const auto had_its_time = [&](const FairHolder& holder) { return now - holder.since >= options_.slot_quantum; };
  if (std::none_of(demand.holders.begin(), demand.holders.end(), had_its_time) && HaveTheirShare(held, line, weight)) {
    return {};
  }
  std::vector<std::string> next;
  for (const size_t i : FairOrder(held, line, weight)) {
    if (static_cast<int>(next.size()) >= most) break;
    next.push_back(line[i]);
  }
  return ChooseFairYields(demand.holders, held, next, weight, options_.slot_quantum, now);
}

bool TurnCore::CanYield(const Turn& turn) { return turn.kind->may_yield() && !turn.stopped && !turn.decided(); }

void TurnCore::BeginYield(Turn& turn) {
  turn.yielding = true;
  if (turn.Going()) return Halt(turn);
  turn.lane->scheduler.Unfeed(turn.sequence);
  turn.fed_end = turn.planned_end;
}

void TurnCore::Yield(const TurnPtr& turn) {
  if (turn->planned_end > turn->saved_position) saves_.Begin(*turn);
  turn->lane->scheduler.Retire(turn->sequence, WarmSession(*turn), WarmBranch(*turn));
  LeaveSlot(*turn);
  turn->yielded = true;
  turn->phase = Phase::kYielded;
  ++yielded_;
  waiting_.push_back(turn);
  metrics_->yielded_turns.Increment();
}

bool TurnCore::HasNoPlace(const Turn& turn) const {
  const auto pool = placement_.pools().find(turn.pool);
  if (pool == placement_.pools().end() || pool->second.lanes == 0) return false;
  const PoolUse active = ActiveByPool();
  const auto used = active.find(turn.pool);
  return used != active.end() && used->second > pool->second.slots;
}

void TurnCore::WaitForPlace(const TurnPtr& turn) {
  turn->phase = Phase::kYielded;
  turn->parked_since = absl::InfiniteFuture();
  ++yielded_;
  const auto is_behind = [](const TurnPtr& other) { return other->lost_since == absl::InfiniteFuture(); };
  waiting_.insert(std::find_if(waiting_.begin(), waiting_.end(), is_behind), turn);
}

void TurnCore::KeepSlot(const Turn& turn) {
  if (waiting_.empty() || !turn.decided()) return;
  std::map<std::string, int> held = HeldByTenant(turn.pool), demand = held;
  int slots = 1;
  for (const auto& [tenant, count] : held) slots += count;
  for (const TurnPtr& other : waiting_) {
    if (other->tenant == turn.tenant) return;  // That one takes it.
    ++demand[other->tenant];
  }
  ++demand[turn.tenant];
  const auto weight = [this](absl::string_view tenant) { return WeightOf(tenant); };
  if (FairAllocation(slots, demand, weight)[turn.tenant] <= held[turn.tenant]) return;
  kept_.Keep(turn.pool, turn.tenant, Now() + options_.slot_kept);
}

}  // namespace rwkv::router
