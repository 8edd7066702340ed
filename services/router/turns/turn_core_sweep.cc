// What the loop does after each batch of events: what a turn may do next follows from what it is.
#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "services/common/grpc_status.h"
#include "services/router/scheduler/fair_slots.h"
#include "services/router/turns/turn_core.h"

namespace rwkv::router {
namespace {

using Kind = Turn::Kind;
using Phase = Turn::Phase;

// Over which tokens a second are counted.
constexpr absl::Duration kRateInterval = absl::Seconds(2);

}  // namespace

bool TurnCore::CommitClean(const Turn& turn) const {
  if (turn.committing) return false;
  if (!turn.HasLog() || turn.abandoned || !turn.answer.has_value()) return true;
  return turn.durable == turn.answer->size() && (!turn.answer->finished() || turn.finish_durable);
}

void TurnCore::TraceStage(Turn& turn) {
  if (turn.trace == nullptr) return;
  const auto stage = [&turn]() -> absl::string_view {
    switch (turn.phase) {
      case Phase::kWaiting:
        return "queue";
      case Phase::kOpening:
        return "open";
      case Phase::kParked:
        return "park";
      case Phase::kLocating:
        return turn.stopped ? "" : "locate";  // Nobody wants to know any more.
      case Phase::kAttaching:
        return "attach";
      case Phase::kRunning:
        return turn.first_token.has_value() ? "decode" : "prefill";
      case Phase::kYielded:
        return "yield";
      case Phase::kComputed:
        return turn.Streaming() ? "commit" : "";
    }
    return "";
  };
  turn.trace->Enter(stage());
}

void TurnCore::SweepTurn(Turn& turn) {
  const absl::Time now = Now();
  // What it left behind when it gave its slot away is on its way to where it is looked for.
  const bool saving = turn.yielded && turn.saves > 0;
  if (turn.phase == Phase::kParked) {
    if (const absl::Status status = placement_.CheckServed(turn); !status.ok()) {
      Fail(turn, status);
    } else if (now >= turn.not_before && !saving && placement_.ChooseLane(turn) != nullptr) {
      Locate(running_.at(turn.id));
    }
  }
  if (turn.phase == Phase::kParked && turn.named && turn.HasLog() &&
      now - turn.parked_since > options_.handover_after && placement_.ChooseLane(turn) == nullptr &&
      world_->OthersDrive(turn.pool)) {
    Fail(turn, common::WithRetryInfo(
                   absl::UnavailableError("this router has lost its pipeline; another goes on with the turn"),
                   options_.retry_delay));
  }
  if (turn.phase == Phase::kParked && now - turn.parked_since > options_.outage_timeout) {
    Fail(turn, common::WithRetryInfo(absl::UnavailableError(absl::StrCat("no pipeline for ",
                                                                         absl::FormatDuration(options_.outage_timeout),
                                                                         ": ", world_->WhyNoLane().message())),
                                     absl::Seconds(1)));
  }
  if (turn.phase == Phase::kRunning) Advance(turn);
  Pump(turn);
  if (turn.phase == Phase::kRunning) Advance(turn);  // Sending may have made room to decode.
  if (turn.phase == Phase::kComputed && turn.session != nullptr && CommitClean(turn)) {
    turn.session->turn = nullptr;
    turn.session = nullptr;
  }
  TraceStage(turn);
}

void TurnCore::Sweep() {
  kept_.Expire(Now());
  StartWaiting();
  for (auto it = running_.begin(); it != running_.end();) {
    const TurnPtr turn = it->second;
    SweepTurn(*turn);
    const bool over =
        turn->phase == Phase::kComputed && turn->session == nullptr && CommitClean(*turn) && !turn->Streaming();
    if (over) DropOwn(*turn);
    it = over ? running_.erase(it) : std::next(it);
  }
  SweepWaiting();
  SweepYields();
  SweepClosing();
  SweepCommits();
  SweepSaves();
  sessions_.Sweep();
  SweepDrain();
  StartWaiting();
  for (auto& [epoch, lane] : placement_.lanes()) SendCommands(*lane);
  Watch();
  UpdateGauges();
}

void TurnCore::SweepWaiting() {
  const absl::Time now = Now();
  for (size_t i = 0; i < waiting_.size();) {
    const TurnPtr turn = waiting_[i];
    if (turn->phase != Phase::kWaiting || now - turn->arrival <= options_.max_wait) {
      ++i;
      continue;
    }
    Fail(*turn, common::WithRetryInfo(
                    absl::ResourceExhaustedError(absl::StrCat(
                        "the call waited for ", absl::FormatDuration(options_.max_wait),
                        " to be started: ", running_.size() - yielded_, " run and ", waiting_.size(), " wait")),
                    absl::Seconds(1)));
  }
}

void TurnCore::SweepYields() {
  if (waiting_.empty() || placement_.lanes().empty()) return;
  const absl::Time now = Now();
  std::map<std::string, std::vector<FairHolder>> holders;      // By pool.
  std::map<std::string, std::vector<std::string>> candidates;  // By pool: the tenants of those that want a slot there.
  std::map<std::string, int> coming;  // By pool: slots that come free without anybody else giving one away.
  int yielding = 0;
  for (const auto& [id, turn] : running_) {
    yielding += turn->yielding;
    coming[turn->pool] += turn->yielding;
    if (turn->phase != Phase::kRunning || turn->yielding || !CanYield(*turn)) continue;
    // Each time it has a slot it gets further than before, whatever became of its snapshots.
    if (turn->tail_pending || turn->patience.furthest() <= turn->progress_at_slot) continue;
    holders[turn->pool].push_back({id, turn->slot_since, turn->tenant});
  }
  if (holders.empty()) return;
  const PoolUse active = ActiveByPool();
  for (const auto& [name, pool] : placement_.pools()) {
    const auto used = active.find(name);
    coming[name] += std::max(0, pool.slots - (used == active.end() ? 0 : used->second));
  }
  for (const TurnPtr& turn : waiting_) {
    if (turn->kind == Kind::kExclusive || !SessionFree(*turn)) continue;
    // Whoever has no pool yet takes a slot wherever one comes free.
    for (auto& [pool, of_pool] : holders) {
      if (turn->pool.empty() ? placement_.pools().count(pool) > 0 &&
                                   placement_.pools().at(pool).model.fingerprint() == turn->model->info.fingerprint()
                             : turn->pool == pool) {
        candidates[pool].push_back(turn->tenant);
        break;
      }
    }
  }
  int saves = static_cast<int>(kSavesPerSlot * placement_.TotalSlots()) - static_cast<int>(saves_.size()) - yielding;
  const auto weight = [this](absl::string_view tenant) { return WeightOf(tenant); };
  for (auto& [pool, of_pool] : holders) {
    std::map<std::string, int> held = HeldByTenant(pool);
    std::vector<std::string>& line = candidates[pool];
    // Whoever gets one of those has no need of another.
    if (coming[pool] > 0) {
      const std::vector<size_t> order = FairOrder(held, line, weight);
      std::vector<std::string> others;
      for (size_t i = 0; i < order.size(); ++i) {
        const std::string& tenant = line[order[i]];
        if (i < static_cast<size_t>(coming[pool])) {
          ++held[tenant];
        } else {
          others.push_back(tenant);
        }
      }
      line = std::move(others);
    }
    if (line.empty()) continue;
    // Behind a flood this is asked with every step and every refusal, and mostly nobody is to yield: nobody has had a
    // slot for long, and whoever waits has its share.
    const auto had_its_time = [&](const FairHolder& holder) { return now - holder.since >= options_.slot_quantum; };
    if (std::none_of(of_pool.begin(), of_pool.end(), had_its_time)) {
      std::map<std::string, int> demand = held;
      for (const std::string& tenant : line) ++demand[tenant];
      int slots = 0;
      for (const auto& [tenant, count] : held) slots += count;
      const std::map<std::string, int> fair = FairAllocation(slots, demand, weight);
      const auto has_its_share = [&held](const auto& share) {
        const auto has = held.find(share.first);
        return share.second <= (has == held.end() ? 0 : has->second);
      };
      if (std::all_of(fair.begin(), fair.end(), has_its_share)) continue;
    }
    std::vector<std::string> next;
    for (const size_t i : FairOrder(held, line, weight)) {
      if (static_cast<int>(next.size()) >= saves) break;
      next.push_back(line[i]);
    }
    for (const uint64_t id : ChooseFairYields(of_pool, held, next, weight, options_.slot_quantum, now)) {
      BeginYield(*running_.at(id));
      --saves;
    }
  }
}

bool TurnCore::CanYield(const Turn& turn) {
  const bool streams = turn.kind == Kind::kGenerate || turn.kind == Kind::kDocument || turn.kind == Kind::kLogits;
  return streams && !turn.stopped && !turn.decided();
}

void TurnCore::BeginYield(Turn& turn) {
  turn.yielding = true;
  if (turn.Going()) return Halt(turn);
  turn.lane->scheduler.Unfeed(turn.sequence);
  turn.fed_end = turn.planned_end;
}

void TurnCore::SweepDrain() {
  if (!draining()) return;
  if (Now() >= pause_at_) {
    for (auto& [id, turn] : running_) {
      if (!turn->stopped && !turn->decided()) Fail(*turn, DrainingStatus());
    }
  }
  if (!running_.empty() || !saves_.empty() || !sessions_.empty()) return;
  world_->Drained();
}

void TurnCore::Watch() {
  const absl::Time now = Now();
  std::set<const TurnLane*> going;
  for (const auto& [sequence, turn] : by_sequence_) {
    if (turn->Going()) going.insert(turn->lane);
  }
  for (auto& [epoch, lane] : placement_.lanes()) {
    const bool is_idle = lane->scheduler.steps_in_flight() == 0 && going.count(lane.get()) == 0;
    if (is_idle) lane->last_progress = now;
    if (is_idle || now - lane->last_progress <= options_.progress_timeout) continue;
    world_->EndEpoch(epoch, absl::UnavailableError(absl::StrCat("no step came back for ",
                                                                absl::FormatDuration(options_.progress_timeout), "; ",
                                                                lane->scheduler.steps_in_flight(), " are in flight")));
    lane->last_progress = now;
  }
  for (const auto& [sequence, turn] : by_sequence_) {
    if (now - turn->attach_since <= options_.attach_timeout) continue;
    const absl::Status late = absl::UnavailableError(
        absl::StrCat("a slot was not attached within ", absl::FormatDuration(options_.attach_timeout)));
    const TurnPtr waiting = turn;  // What follows takes it out.
    const uint64_t epoch = turn->lane->epoch;
    if (waiting->prefix.attached) waiting->prefix.off = true;  // Its state may be what hangs: the input is read.
    if (waiting->patience.AttachTimedOut() == Patience::Verdict::kGiveUp) {
      Fail(*waiting, common::WithRetryInfo(late, absl::Seconds(1)));
    }
    world_->EndEpoch(epoch, late);
    return;
  }
}

void TurnCore::UpdateGauges() {
  running_count_ = static_cast<int>(running_.size());
  waiting_count_ = static_cast<int>(waiting_.size());
  if (const absl::Duration since = Now() - counted_at_; since >= kRateInterval) {
    tokens_per_second_ = static_cast<double>(tokens_drawn_ - tokens_counted_) / absl::ToDoubleSeconds(since);
    tokens_counted_ = tokens_drawn_;
    counted_at_ += since;
  }
  metrics_->running_turns.Set(static_cast<double>(running_.size()));
  metrics_->waiting_turns.Set(static_cast<double>(waiting_.size()));
  int slots = 0, used = 0, warm = 0, steps = 0;
  for (auto& [epoch, lane] : placement_.lanes()) {
    slots += lane->plan.slots;
    used += lane->scheduler.slots_in_use();
    warm += lane->scheduler.slots_warm();
    steps += lane->scheduler.steps_in_flight();
    if (const int turns = lane->scheduler.sequences(); std::exchange(lane->told_turns, turns) != turns) {
      world_->SetTurns(epoch, turns);
    }
  }
  metrics_->slots_used.Set(used);
  metrics_->slots_warm.Set(warm);
  metrics_->slots_free.Set(slots - used - warm);
  metrics_->microbatches_in_flight.Set(steps);
}

}  // namespace rwkv::router
