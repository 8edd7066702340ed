// Lanes come and go; which of them a turn runs on.
#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/router/turns/embedding.h"
#include "services/router/turns/turn_core.h"
#include "services/router/turns/turn_input.h"

namespace rwkv::router {
namespace {

using Kind = Turn::Kind;
using Phase = Turn::Phase;

}  // namespace

void TurnCore::EpochClosing(uint64_t epoch) {
  const auto it = lanes_.find(epoch);
  if (it == lanes_.end()) return;
  common::LogInfo("lane_closes", {{"epoch", epoch}, {"turns", it->second->scheduler.sequences()}});
  it->second->closing = true;
  CountSlots();
}

void TurnCore::PoolsSeen(const std::vector<std::string>& pools) {
  seen_pools_ = pools;
  DropPools();
}

void TurnCore::EpochUp(uint64_t epoch, const StagePlan& plan) {
  Scheduler::Options options;
  options.stages = static_cast<int>(plan.stages.size());
  options.slots = plan.slots;
  options.max_batch_rows = plan.max_batch_rows;
  options.max_sequences = options_.max_running;
  std::unique_ptr<TurnLane>& lane = lanes_[epoch];
  lane = std::make_unique<TurnLane>(epoch, plan, options);
  lane->last_progress = Now();
  const std::string& family = plan.stages.front().worker.numeric_family();
  lane->pool = PoolName(plan.model.fingerprint(), family);
  Pool& pool = pools_[lane->pool];
  pool.name = lane->pool;
  pool.model = plan.model;
  pool.numeric_family = family;
  CountSlots();
  DropPools();
  metrics_->epochs.Increment();
  if (!serving_.exchange(true)) world_->SetServing(true);
}

void TurnCore::EpochDown(uint64_t epoch, const absl::Status& why) {
  const auto it = lanes_.find(epoch);
  if (it == lanes_.end()) return;
  const std::unique_ptr<TurnLane> lane = std::move(it->second);
  lanes_.erase(it);
  if (!stopping_) metrics_->epochs_lost.Increment();
  std::vector<std::string> lost;
  for (const auto& [id, save] : saves_) {
    if (save.epoch == epoch && !save.committing && save.answers_left > 0) lost.push_back(id);
  }
  for (auto& [id, turn] : running_) {
    if (turn->lane == lane.get()) Unseat(*turn, why);
  }
  for (const std::string& id : lost) EndSave(id, why);
  CountSlots();
  DropPools();
  if (!lanes_.empty()) return;
  serving_ = false;
  world_->SetServing(false);
}

void TurnCore::Unseat(Turn& turn, const absl::Status& why) {
  const bool computing = turn.phase == Phase::kRunning ? turn.planned_end > turn.attach_position
                                                       : turn.attach_since != absl::InfiniteFuture();
  by_sequence_.erase(turn.sequence);
  turn.sequence = 0;
  turn.lane = nullptr;
  turn.yielding = false;
  turn.tail.clear();
  turn.tail_pending = false;
  turn.attach_since = absl::InfiniteFuture();
  turn.export_snapshot.clear();
  if (turn.decided() || turn.stopped) {
    turn.phase = Phase::kComputed;  // Its state is not in a slot any more; the log has it all.
    return;
  }
  Park(turn);
  metrics_->recovered_turns.Increment();
  if (!computing || turn.patience.EpochLost() != Patience::Verdict::kGiveUp) return;
  Fail(turn, common::WithRetryInfo(absl::UnavailableError(absl::StrCat("the pipeline was lost ", Patience::kLostEpochs,
                                                                       " times while the turn was at position ",
                                                                       turn.patience.furthest(), ": ", why.message())),
                                   absl::Seconds(1)));
}

void TurnCore::CountSlots() {
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

void TurnCore::DropPools() {
  if (seen_pools_.empty()) return;  // Nobody is seen at all: they may all come back.
  const size_t before = pools_.size();
  for (auto it = pools_.begin(); it != pools_.end();) {
    const bool has_lane =
        std::any_of(lanes_.begin(), lanes_.end(), [&it](const auto& lane) { return lane.second->pool == it->first; });
    const bool is_seen = std::find(seen_pools_.begin(), seen_pools_.end(), it->first) != seen_pools_.end();
    it = has_lane || is_seen ? std::next(it) : pools_.erase(it);
  }
  if (pools_.size() != before) world_->PoolsDropped();
}

PoolUse TurnCore::ActiveByPool() const {
  PoolUse active;
  for (const auto& [id, turn] : running_) {
    if (turn->Active() && turn->kind != Kind::kExclusive) ++active[turn->pool];
  }
  return active;
}

bool TurnCore::KnowsModel(const std::string& fingerprint) const {
  return std::any_of(pools_.begin(), pools_.end(),
                     [&fingerprint](const auto& pool) { return pool.second.model.fingerprint() == fingerprint; });
}

const Pool* TurnCore::ChoosePool(const Turn& turn, const PoolUse& active) const {
  const Pool* best = nullptr;
  int best_spare = 0;
  for (const auto& [name, pool] : pools_) {
    if (turn.pool.empty() ? pool.model.fingerprint() != turn.model->info.fingerprint() : name != turn.pool) continue;
    const auto used = active.find(name);
    const int spare = pool.slots - (used == active.end() ? 0 : used->second);
    if (spare <= best_spare) continue;
    best = &pool;
    best_spare = spare;
  }
  return best;
}

absl::Status TurnCore::CheckServed(const Turn& turn) const {
  const auto pool = pools_.find(turn.pool);
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
    if (lane->pool != turn.pool) continue;
    const absl::Status status = CheckLane(turn, *lane);
    if (status.ok()) return status;
    if (first.ok()) first = status;
  }
  return first;
}

absl::Status TurnCore::CheckLane(const Turn& turn, const TurnLane& lane) const {
  if (const absl::Status status = CheckOffered(turn.initial_state, lane.plan.model); !status.ok()) {
    return common::Annotate(status, "the tuned states have changed");
  }
  return turn.kind == Kind::kEmbed ? CheckEmbedSource(turn.embed.source(), lane.plan.state_layout) : absl::OkStatus();
}

bool TurnCore::IsOpenTo(const Turn& turn, const TurnLane& lane) const {
  return !lane.closing && lane.pool == turn.pool && CheckLane(turn, lane).ok();
}

bool TurnCore::HasLane(const Turn& turn) const {
  return std::any_of(lanes_.begin(), lanes_.end(), [&turn](const auto& lane) {
    return lane.second->plan.model.fingerprint() == turn.model->info.fingerprint();
  });
}

TurnLane* TurnCore::ChooseLane(const Turn& turn) const {
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

void TurnCore::DropWarm(absl::string_view session_id) {
  for (const auto& [epoch, lane] : lanes_) lane->scheduler.DropWarm(session_id);
}

int TurnCore::TotalSlots() const {
  int slots = 0;
  for (const auto& [name, pool] : pools_) slots += pool.slots;
  return slots;
}

void TurnCore::SweepClosing() {
  for (const auto& [epoch, lane] : lanes_) {
    if (!lane->closing) continue;
    bool is_used = false;
    for (const auto& [sequence, turn] : by_sequence_) {
      if (turn->lane != lane.get()) continue;
      is_used = true;
      if (turn->phase == Phase::kRunning && !turn->yielding && CanYield(*turn)) BeginYield(*turn);
    }
    for (const auto& [id, save] : saves_) is_used |= save.epoch == epoch && save.answers_left > 0;
    if (!is_used) world_->EndEpoch(epoch, absl::UnavailableError("given to another router"));
  }
}

std::vector<LaneState> TurnCore::Lanes() const {
  std::vector<LaneState> lanes;
  for (const auto& [epoch, lane] : lanes_) {
    const Scheduler& scheduler = lane->scheduler;
    lanes.push_back({epoch, lane->plan, lane->closing, scheduler.sequences(), scheduler.slots_in_use(),
                     scheduler.slots_warm(), scheduler.rows_waiting()});
  }
  return lanes;
}

}  // namespace rwkv::router
