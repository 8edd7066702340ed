#include "services/router/core/placement.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "services/common/grpc_status.h"
#include "services/router/core/turn_input.h"

namespace rwkv::router {

TurnLane* Placement::Find(uint64_t epoch) const {
  const auto it = lanes_.find(epoch);
  return it == lanes_.end() ? nullptr : it->second.get();
}

bool Placement::Add(uint64_t epoch, const StagePlan& plan, absl::Time now) {
  Scheduler::Options options;
  options.stages = static_cast<int>(plan.stages.size());
  options.slots = plan.slots;
  options.max_batch_rows = plan.max_batch_rows;
  options.max_sequences = max_sequences_;
  std::unique_ptr<TurnLane>& lane = lanes_[epoch];
  lane = std::make_unique<TurnLane>(epoch, plan, options);
  lane->last_progress = now;
  const std::string& family = plan.stages.front().worker.numeric_family();
  lane->pool = PoolName(plan.model.fingerprint(), family);
  Pool& pool = pools_[lane->pool];
  pool.name = lane->pool;
  pool.model = plan.model;
  pool.numeric_family = family;
  CountSlots();
  return DropPools();
}

bool Placement::Remove(uint64_t epoch, std::unique_ptr<TurnLane>* lane) {
  const auto it = lanes_.find(epoch);
  if (it == lanes_.end()) return false;
  *lane = std::move(it->second);
  lanes_.erase(it);
  CountSlots();
  return DropPools();
}

bool Placement::SetSeen(const std::vector<std::string>& pools) {
  ++version_;
  seen_pools_ = pools;
  return DropPools();
}

void Placement::Close(TurnLane& lane) {
  lane.closing = true;
  CountSlots();
}

void Placement::CountSlots() {
  ++version_;
  for (auto& [name, pool] : pools_) {
    int slots = 0;
    pool.lanes = 0;
    for (const auto& [epoch, lane] : lanes_) {
      if (lane->pool != name || lane->closing) continue;
      ++pool.lanes;
      slots += lane->plan.slots;
    }
    if (pool.lanes > 0) pool.slots = slots;
  }
}

bool Placement::DropPools() {
  if (seen_pools_.empty()) return false;  // Nobody is seen at all: they may all come back.
  const size_t before = pools_.size();
  for (auto it = pools_.begin(); it != pools_.end();) {
    const bool has_lane =
        std::any_of(lanes_.begin(), lanes_.end(), [&it](const auto& lane) { return lane.second->pool == it->first; });
    const bool is_seen = std::find(seen_pools_.begin(), seen_pools_.end(), it->first) != seen_pools_.end();
    it = has_lane || is_seen ? std::next(it) : pools_.erase(it);
  }
  return pools_.size() != before;
}

bool Placement::KnowsModel(const std::string& fingerprint) const {
  return std::any_of(pools_.begin(), pools_.end(),
                     [&fingerprint](const auto& pool) { return pool.second.model.fingerprint() == fingerprint; });
}

const Pool* Placement::ChoosePool(const Turn& turn, const PoolUse& active) const {
  const Pool* best = nullptr;
  int best_spare = 0;
  for (const auto& [name, pool] : pools_) {
    if (turn.pool().empty() ? pool.model.fingerprint() != turn.model->info.fingerprint() : name != turn.pool())
      continue;
    const auto used = active.find(name);
    const int spare = pool.slots - (used == active.end() ? 0 : used->second);
    if (spare <= best_spare) continue;
    best = &pool;
    best_spare = spare;
  }
  return best;
}

absl::Status Placement::CheckServed(const Turn& turn) const {
  const auto pool = pools_.find(turn.pool());
  if (pool == pools_.end()) {
    if (KnowsModel(turn.model->info.fingerprint())) {
      return common::WithRetryInfo(
          absl::UnavailableError(absl::StrCat("the turn began with kernels of the numeric family ",
                                              turn.spec.numeric_family(), ", and no pipeline here has them")),
          absl::Seconds(1));
    }
    std::vector<std::string> there;
    for (const auto& [name, other] : pools_) there.push_back(other.model.fingerprint());
    if (there.empty()) there = seen_pools_;
    return absl::FailedPreconditionError(absl::StrCat("the model has changed: the turn began with fingerprint ",
                                                      turn.model->info.fingerprint(), ", the pipeline now holds ",
                                                      absl::StrJoin(there, ", ")));
  }
  absl::Status first;
  for (const auto& [epoch, lane] : lanes_) {
    if (lane->pool != turn.pool()) continue;
    const absl::Status status = CheckLane(turn, *lane);
    if (status.ok()) return status;
    if (first.ok()) first = status;
  }
  return first;
}

absl::Status Placement::CheckLane(const Turn& turn, const TurnLane& lane) const {
  if (const absl::Status status = CheckOffered(turn.initial_state, lane.plan.model); !status.ok()) {
    return common::Annotate(status, "the tuned states have changed");
  }
  return turn.kind->CheckLayout(lane.plan.state_layout);
}

bool Placement::IsOpenTo(const Turn& turn, const TurnLane& lane) const {
  return !lane.closing && lane.pool == turn.pool() && CheckLane(turn, lane).ok();
}

bool Placement::HasLane(const Turn& turn) const {
  return std::any_of(lanes_.begin(), lanes_.end(), [&turn](const auto& lane) {
    return lane.second->plan.model.fingerprint() == turn.model->info.fingerprint();
  });
}

TurnLane* Placement::ChooseLane(const Turn& turn) const {
  TurnLane* best = nullptr;
  std::tuple<int, int64_t, int> least;
  for (const auto& [epoch, lane] : lanes_) {
    if (!IsOpenTo(turn, *lane)) continue;
    const Scheduler& scheduler = lane->scheduler;
    // Those that would wait for a slot, rows before it, then how full it is.
    const std::tuple<int, int64_t, int> load = {std::max(0, scheduler.sequences() + 1 - lane->plan.slots),
                                                scheduler.rows_waiting(), scheduler.sequences()};
    if (best != nullptr && load >= least) continue;
    best = lane.get();
    least = load;
  }
  return best;
}

void Placement::DropWarm(absl::string_view session_id) const {
  for (const auto& [epoch, lane] : lanes_) lane->scheduler.DropWarm(session_id);
}

int Placement::TotalSlots() const {
  int slots = 0;
  for (const auto& [name, pool] : pools_) slots += pool.slots;
  return slots;
}

}  // namespace rwkv::router
