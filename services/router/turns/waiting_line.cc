#include "services/router/turns/waiting_line.h"

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "absl/strings/string_view.h"
#include "services/router/scheduler/fair_slots.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

}  // namespace

WaitingLine::WaitingLine(const CoreContext& context, const TurnTable& turns, const Placement& placement,
                         const SessionTable& sessions)
    : context_(context), turns_(turns), placement_(placement), sessions_(sessions) {}

bool WaitingLine::Fits(const Turn& turn, const PoolUse& active) const {
  if (RunsMost()) return false;
  // One whose model, or pool, is gone may start, too: that is its end.
  if (!turn.kind->takes_slot()) return true;
  const bool is_known = turn.pool.empty() ? placement_.KnowsModel(turn.model->info.fingerprint())
                                          : placement_.pools().count(turn.pool) > 0;
  if (!is_known) return true;
  if (kept_.empty()) return placement_.ChoosePool(turn, active) != nullptr;
  PoolUse with_kept = active;
  size_t kept = 0;
  for (const auto& [pool, count] : kept_.ForOthersThan(turn.tenant)) {
    with_kept[pool] += count;
    kept += count;
  }
  return running() + kept < static_cast<size_t>(context_.options.max_running) &&
         placement_.ChoosePool(turn, with_kept) != nullptr;
}

bool WaitingLine::SessionFree(const Turn& turn) const {
  if (turn.phase == Phase::kYielded || turn.session_id.empty()) return true;
  const Session* const held = sessions_.Find(turn.session_id);
  if (held == nullptr) return true;
  const Session& session = *held;
  if (session.turn != nullptr || session.releasing) return false;
  if (session.next != nullptr && session.next.get() != &turn) return false;
  // Both want the snapshots that are on their way: one to read, the other to have what stays true.
  const bool wants_saves = turn.kind->wants_snapshot() || !turn.kind->takes_slot();
  return !wants_saves || session.saves == 0 || context_.Now() - turn.arrival >= kSaveWait;
}

std::vector<TurnPtr> WaitingLine::Order() const {
  std::vector<TurnPtr> line(line_.begin(), line_.end());
  const auto same = [&line](const TurnPtr& turn) { return turn->tenant == line.front()->tenant; };
  if (std::all_of(line.begin(), line.end(), same)) return line;
  std::vector<std::string> tenants;
  for (const TurnPtr& turn : line) tenants.push_back(turn->tenant);
  const auto weight = [this](absl::string_view tenant) { return context_.WeightOf(tenant); };
  std::vector<TurnPtr> fair;
  for (const size_t i : FairOrder(turns_.HeldByTenant(""), tenants, weight)) fair.push_back(line[i]);
  return fair;
}

void WaitingLine::Add(const TurnPtr& turn) {
  if (turn->phase == Phase::kYielded) ++yielded_;
  line_.push_back(turn);
}

void WaitingLine::AddLost(const TurnPtr& turn) {
  ++yielded_;
  const auto is_behind = [](const TurnPtr& other) { return other->lost_since == absl::InfiniteFuture(); };
  line_.insert(std::find_if(line_.begin(), line_.end(), is_behind), turn);
}

void WaitingLine::Remove(const Turn& turn) {
  const auto at =
      std::find_if(line_.begin(), line_.end(), [&turn](const TurnPtr& other) { return other.get() == &turn; });
  if (at == line_.end()) return;
  if (turn.phase == Phase::kYielded) --yielded_;
  line_.erase(at);
}

bool WaitingLine::Take(const TurnPtr& turn) {
  const size_t before = line_.size();
  Remove(*turn);
  return line_.size() < before;
}

absl::optional<WaitingLine::Leaver> WaitingLine::ChooseLeaver(const Turn& newcomer) const {
  std::map<std::string, int> waiting;
  for (const TurnPtr& other : line_) ++waiting[other->tenant];
  const auto share = [this](const auto& line) { return line.second / context_.WeightOf(line.first); };
  const auto most = std::max_element(waiting.begin(), waiting.end(),
                                     [&](const auto& a, const auto& b) { return share(a) < share(b); });
  if (most == waiting.end() || (waiting[newcomer.tenant] + 1) / context_.WeightOf(newcomer.tenant) >= share(*most)) {
    return absl::nullopt;
  }
  for (auto last = line_.rbegin(); last != line_.rend(); ++last) {
    if ((*last)->tenant == most->first && (*last)->phase == Phase::kWaiting) return Leaver{*last, most->second};
  }
  return absl::nullopt;
}

std::vector<TurnPtr> WaitingLine::Overdue() const {
  const absl::Time now = context_.Now();
  std::vector<TurnPtr> overdue;
  for (const TurnPtr& turn : line_) {
    if (turn->phase == Phase::kWaiting && now - turn->arrival > context_.options.max_wait) overdue.push_back(turn);
  }
  return overdue;
}

void WaitingLine::KeepSlot(const Turn& turn) {
  if (line_.empty() || !turn.decided()) return;
  std::map<std::string, int> held = turns_.HeldByTenant(turn.pool), demand = held;
  int slots = 1;
  for (const auto& [tenant, count] : held) slots += count;
  for (const TurnPtr& other : line_) {
    if (other->tenant == turn.tenant) return;  // That one takes it.
    ++demand[other->tenant];
  }
  ++demand[turn.tenant];
  const auto weight = [this](absl::string_view tenant) { return context_.WeightOf(tenant); };
  if (FairAllocation(slots, demand, weight)[turn.tenant] <= held[turn.tenant]) return;
  kept_.Keep(turn.pool, turn.tenant, context_.Now() + context_.options.slot_kept);
}

}  // namespace rwkv::router
