#include "services/router/core/waiting_line.h"

#include <algorithm>

#include "absl/strings/string_view.h"
#include "services/router/scheduler/fair_slots.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

}  // namespace

// Of a tenant: whose turn it is next, as FairOrder() has it.
struct WaitingLine::Group {
  const std::string* tenant;
  Line::iterator next;
  Line::iterator end;
  double weight;
  int has;  // Slots, those included that its turns before `next` would have.

  std::pair<double, Place> key() const { return {(has + 1) / weight, next->first}; }
};

WaitingLine::WaitingLine(const CoreContext& context, const TurnTable& turns, const Placement& placement,
                         const SessionTable& sessions)
    : context_(context), turns_(turns), placement_(placement), sessions_(sessions) {}

std::vector<TurnPtr> WaitingLine::turns() const {
  std::vector<TurnPtr> turns;
  for (const auto& [place, turn] : line_) turns.push_back(turn);
  return turns;
}

bool WaitingLine::IsKnown(const Turn& turn) const {
  if (!turn.kind->takes_slot()) return true;
  return turn.pool().empty() ? placement_.KnowsModel(turn.model->info.fingerprint())
                             : placement_.pools().count(turn.pool()) > 0;
}

bool WaitingLine::Fits(const Turn& turn, const PoolUse& active) const {
  if (RunsMost()) return false;
  // One whose model, or pool, is gone may start, too: that is its end.
  if (!turn.kind->takes_slot() || !IsKnown(turn)) return true;
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

absl::Time WaitingLine::FreeAt(const Turn& turn) const {
  if (turn.phase() == Phase::kYielded || turn.session_id.empty()) return absl::InfinitePast();
  const Session* const held = sessions_.Find(turn.session_id);
  if (held == nullptr) return absl::InfinitePast();
  const Session& session = *held;
  if (session.turn != nullptr || session.releasing) return absl::InfiniteFuture();
  if (session.next != nullptr && session.next.get() != &turn) return absl::InfiniteFuture();
  // Both want the snapshots that are on their way: one to read, the other to have what stays true.
  const bool wants_saves = turn.kind->wants_snapshot() || !turn.kind->takes_slot();
  return !wants_saves || session.saves == 0 ? absl::InfinitePast() : turn.arrival + kSaveWait;
}

bool WaitingLine::SomeNeedNoSlot() {
  if (known_version_ != placement_.version()) {
    known_version_ = placement_.version();
    homeless_ = std::count_if(line_.begin(), line_.end(), [this](const auto& at) { return !IsKnown(*at.second); });
  }
  return slotless_ + homeless_ > 0;
}

bool WaitingLine::HasSlotFor(const std::string& tenant) const {
  const std::map<std::string, int> kept = kept_.ForOthersThan(tenant);
  return std::any_of(placement_.pools().begin(), placement_.pools().end(), [&](const auto& pool) {
    const auto others = kept.find(pool.first);
    const int used = turns_.tally().active(pool.first) + (others == kept.end() ? 0 : others->second);
    return used < pool.second.slots;
  });
}

std::vector<WaitingLine::Group> WaitingLine::Groups(bool all) {
  const TurnTally::Held& held = turns_.tally().held("");
  std::vector<Group> groups;
  for (auto& [tenant, line] : of_tenant_) {
    if (!all && !HasSlotFor(tenant)) continue;
    const auto has = held.find(tenant);
    groups.push_back(
        {&tenant, line.begin(), line.end(), context_.WeightOf(tenant), has == held.end() ? 0 : has->second});
  }
  return groups;
}

void WaitingLine::OfferRoom(absl::FunctionRef<void(const TurnPtr&)> start) {
  if (line_.empty() || RunsMost()) return;
  const absl::Time now = context_.Now();
  const Version version = this->version();
  if (offered_ == version && now < offer_again_) return;
  const bool all = SomeNeedNoSlot();
  absl::Time again = absl::InfiniteFuture();
  bool started = false;
  std::vector<Group> groups = Groups(all);
  while (!groups.empty() && !RunsMost()) {
    const auto group = std::min_element(groups.begin(), groups.end(),
                                        [](const Group& a, const Group& b) { return a.key() < b.key(); });
    const TurnPtr turn = group->next->second;
    ++group->next;
    ++group->has;
    if (group->next == group->end) groups.erase(group);
    const absl::Time free_at = FreeAt(*turn);
    if (free_at > now) again = std::min(again, free_at);
    // Others need not wait for its session to close.
    if (free_at > now || !Fits(*turn, turns_.tally().active())) continue;
    Remove(*turn);
    start(turn);
    started = true;
    if (all) continue;
    const auto is_out = [this](const Group& one) { return !HasSlotFor(*one.tenant); };
    groups.erase(std::remove_if(groups.begin(), groups.end(), is_out), groups.end());
  }
  // Whom it started may have changed what was said of those before.
  offered_ = started ? absl::nullopt : absl::make_optional(version);
  offer_again_ = again;
}

void WaitingLine::Insert(int rank, const TurnPtr& turn) {
  const Place place = {rank, next_place_++};
  line_[place] = turn;
  of_tenant_[turn->tenant][place] = turn;
  places_[turn.get()] = place;
  yielded_ += turn->phase() == Phase::kYielded;
  slotless_ += !turn->kind->takes_slot();
  homeless_ += !IsKnown(*turn);
  ++version_;
}

void WaitingLine::Add(const TurnPtr& turn) {
  Insert(1, turn);
  if (turn->phase() != Phase::kWaiting) return;
  overdue_at_ = std::min(overdue_at_, turn->arrival + context_.options.max_wait);
}

void WaitingLine::AddLost(const TurnPtr& turn) { Insert(0, turn); }

bool WaitingLine::Remove(const Turn& turn) {
  const auto at = places_.find(&turn);
  if (at == places_.end()) return false;
  const Place place = at->second;
  yielded_ -= turn.phase() == Phase::kYielded;
  slotless_ -= !turn.kind->takes_slot();
  homeless_ -= !IsKnown(turn);
  ++version_;
  places_.erase(at);
  const auto own = of_tenant_.find(turn.tenant);
  own->second.erase(place);
  if (own->second.empty()) of_tenant_.erase(own);
  line_.erase(place);  // May be the last that holds it.
  return true;
}

absl::optional<WaitingLine::Leaver> WaitingLine::ChooseLeaver(const Turn& newcomer) const {
  const auto share = [this](const auto& line) {
    return static_cast<int>(line.second.size()) / context_.WeightOf(line.first);
  };
  const auto most = std::max_element(of_tenant_.begin(), of_tenant_.end(),
                                     [&](const auto& a, const auto& b) { return share(a) < share(b); });
  if (most == of_tenant_.end()) return absl::nullopt;
  const auto own = of_tenant_.find(newcomer.tenant);
  const int with_it = (own == of_tenant_.end() ? 0 : static_cast<int>(own->second.size())) + 1;
  if (with_it / context_.WeightOf(newcomer.tenant) >= share(*most)) return absl::nullopt;
  for (auto last = most->second.rbegin(); last != most->second.rend(); ++last) {
    if (last->second->phase() == Phase::kWaiting) return Leaver{last->second, static_cast<int>(most->second.size())};
  }
  return absl::nullopt;
}

std::vector<TurnPtr> WaitingLine::Overdue() {
  const absl::Time now = context_.Now();
  std::vector<TurnPtr> overdue;
  if (now <= overdue_at_) return overdue;
  overdue_at_ = absl::InfiniteFuture();
  for (const auto& [place, turn] : line_) {
    if (turn->phase() != Phase::kWaiting) continue;
    const absl::Time at = turn->arrival + context_.options.max_wait;
    if (now > at) overdue.push_back(turn);
    overdue_at_ = std::min(overdue_at_, at);
  }
  return overdue;
}

void WaitingLine::KeepSlot(const Turn& turn) {
  // One of the tenant's that waits takes it.
  if (line_.empty() || !turn.decided() || of_tenant_.count(turn.tenant) > 0) return;
  const TurnTally::Held& held = turns_.tally().held(turn.pool());
  std::map<std::string, int> demand = held;
  int slots = 1;
  for (const auto& [tenant, count] : held) slots += count;
  for (const auto& [tenant, line] : of_tenant_) demand[tenant] += static_cast<int>(line.size());
  ++demand[turn.tenant];
  const auto weight = [this](absl::string_view tenant) { return context_.WeightOf(tenant); };
  const auto has = held.find(turn.tenant);
  if (FairAllocation(slots, demand, weight)[turn.tenant] <= (has == held.end() ? 0 : has->second)) return;
  kept_.Keep(turn.pool(), turn.tenant, context_.Now() + context_.options.slot_kept);
}

}  // namespace rwkv::router
