#include "services/router/turns/turn_core.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/router/scheduler/fair_slots.h"
#include "services/router/turns/turn_input.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

// When one of many that are refused at once may come again: not all in the same instant, which those who decode would
// feel.
absl::Duration ComeAgain(World* world) { return absl::Milliseconds(500) + absl::Milliseconds(world->Random() % 1000); }

bool SameTurn(const Turn& a, const Turn& b) { return a.named && b.named && a.request_id == b.request_id; }

}  // namespace

TurnCore::TurnCore(const Options& options, World* world, state_store::CatalogClient* catalog, RouterMetrics* metrics)
    : options_(options),
      world_(world),
      catalog_(catalog),
      metrics_(metrics),
      sessions_(
          options_, world, catalog, [this] { return StoreDeadline(); },
          [this](Session& session) { OnLeaseLost(session); }),
      log_writer_(world, catalog,
                  [this](const std::vector<LogWriter::Item>& items, absl::Duration took) { OnCommitted(items, took); }),
      counted_at_(world->Now()),
      placement_(options.max_running),
      prefixes_(options_.prefix_cache, &placement_, world, catalog, metrics, [this] { return StoreDeadline(); }),
      saves_(
          options_, world, catalog, &sessions_, &prefixes_, metrics, [this] { return StoreDeadline(); },
          [this](const PendingSave& save, bool is_whole, const absl::Status& status) {
            OnSaveEnded(save, is_whole, status);
          }) {}

void TurnCore::Stop() {
  const absl::Status status = DrainingStatus();
  while (!waiting_.empty()) Fail(*waiting_.front(), status);
  for (auto& [id, turn] : running_) Fail(*turn, status);
}

void TurnCore::BeginDrain(absl::Time pause_at) {
  pause_at_ = pause_at;
  common::LogInfo("drain_begins", {{"running", running_.size()}, {"waiting", waiting_.size()}});
  for (const TurnPtr& turn : std::deque<TurnPtr>(waiting_)) {
    if (turn->phase == Phase::kWaiting) Fail(*turn, DrainingStatus());
  }
}

absl::Status TurnCore::DrainingStatus() const {
  return common::WithRetryInfo(
      absl::UnavailableError("the router is going away; a named turn can be resumed with its request_id"),
      absl::Seconds(1));
}

void TurnCore::Cancel(CallId call) {
  const auto it = by_call_.find(call);
  if (it == by_call_.end()) return;
  const TurnPtr turn = it->second;
  EndCall(*turn, absl::CancelledError("the client is gone"));
  // What has its end is brought to it; all else waits in the log for the client to come back.
  if (!turn->decided()) Abandon(*turn);
}

void TurnCore::Reject(Turn& turn, const absl::Status& status) { CloseStreams(turn, status); }

void TurnCore::Arrive(const TurnPtr& turn) {
  if (draining()) return Reject(*turn, DrainingStatus());
  turn->id = next_turn_++;
  const auto busy = [this, &turn] {
    return common::WithRetryInfo(
        absl::AbortedError(absl::StrCat("session \"", turn->session_id, "\": another turn is running")),
        options_.retry_delay);
  };
  if (const Session* const held = sessions_.Find(turn->session_id); held != nullptr) {
    const Session& session = *held;
    if (session.turn != nullptr && !session.turn->stopped) {
      if (SameTurn(*session.turn, *turn)) return Join(session.turn, *turn);
      if (!session.turn->decided()) return Reject(*turn, busy());
    }
    if (session.next != nullptr) {
      if (SameTurn(*session.next, *turn)) return Join(session.next, *turn);
      return Reject(*turn, busy());
    }
  }
  if (turn->kind->takes_slot() && !placement_.HasLane(*turn)) {
    absl::Status why = world_->WhyNoLane();
    if (why.ok()) {
      why = absl::UnavailableError(
          placement_.lanes().empty()
              ? "the pipeline is just coming up"
              : absl::StrCat("no pipeline of the model ", turn->model->info.name(), " serves at this router just now"));
    }
    if (absl::IsUnavailable(why)) why = common::WithRetryInfo(why, absl::Seconds(1));
    return Reject(*turn, why);
  }
  StartWaiting();
  if (!CanStart(*turn) && static_cast<int>(waiting_.size()) >= options_.max_waiting && !MakeRoom(*turn)) {
    return Reject(
        *turn, common::WithRetryInfo(absl::ResourceExhaustedError(absl::StrCat("too many requests: ", running_.size(),
                                                                               " run and ", waiting_.size(), " wait")),
                                     ComeAgain(world_)));
  }
  by_call_[turn->call] = turn;
  TraceStage(*turn);
  if (CanStart(*turn)) return StartTurn(turn);
  waiting_.push_back(turn);
  if (!turn->session_id.empty()) sessions_.Of(turn->session_id).next = turn;
}

void TurnCore::Join(const TurnPtr& live, Turn& call) {
  if (live->prompt != call.prompt) {
    return Reject(call, common::InvalidFieldError("request_id", "names a turn with another input"));
  }
  if (const absl::Status same = CheckSameSpec(live->spec, call.spec); !same.ok()) return Reject(call, same);
  if (!call.initial_state.empty() && call.initial_state != live->initial_state) {
    return Reject(call, common::InvalidFieldError("initial_state", "the turn began with another one"));
  }
  if (!live->answer.has_value() && call.resume_from > live->resume_from) {
    // How many tokens it has is not known yet, and a wrong guess must not end it.
    return Reject(call, common::WithRetryInfo(absl::AbortedError("the turn is just being opened by another call"),
                                              options_.retry_delay));
  }
  if (live->answer.has_value() && call.resume_from > live->durable) {
    return Reject(call, absl::OutOfRangeError(absl::StrCat("resume_from ", call.resume_from, " is beyond the ",
                                                           live->durable, " tokens of the turn")));
  }
  EndCall(*live, absl::AbortedError("a later call with the same request_id took over"));
  live->call = call.call;
  live->kind = std::move(call.kind);
  live->trace = std::move(call.trace);
  live->resume_from = call.resume_from;
  live->sent = call.resume_from;
  live->waits_for_room = false;
  live->stalled_since = absl::InfiniteFuture();
  by_call_[live->call] = live;
}

bool TurnCore::RunsMost() const { return running_.size() - yielded_ >= static_cast<size_t>(options_.max_running); }

bool TurnCore::Fits(const Turn& turn, const PoolUse& active) const {
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
  return running_.size() - yielded_ + kept < static_cast<size_t>(options_.max_running) &&
         placement_.ChoosePool(turn, with_kept) != nullptr;
}

bool TurnCore::SessionFree(const Turn& turn) const {
  if (turn.phase == Phase::kYielded || turn.session_id.empty()) return true;
  const Session* const held = sessions_.Find(turn.session_id);
  if (held == nullptr) return true;
  const Session& session = *held;
  if (session.turn != nullptr || session.releasing) return false;
  if (session.next != nullptr && session.next.get() != &turn) return false;
  // Both want the snapshots that are on their way: one to read, the other to have what stays true.
  const bool wants_saves = turn.kind->wants_snapshot() || !turn.kind->takes_slot();
  return !wants_saves || session.saves == 0 || Now() - turn.arrival >= kSaveWait;
}

double TurnCore::WeightOf(absl::string_view tenant) const {
  return options_.tenant_weight ? options_.tenant_weight(std::string(tenant)) : 1;
}

std::map<std::string, int> TurnCore::HeldByTenant(const std::string& pool) const {
  std::map<std::string, int> held;
  for (const auto& [id, turn] : running_) {
    if (!turn->Active() || turn->yielding) continue;
    if (pool.empty() || turn->pool == pool) ++held[turn->tenant];
  }
  return held;
}

bool TurnCore::MakeRoom(const Turn& turn) {
  std::map<std::string, int> waiting;
  for (const TurnPtr& other : waiting_) ++waiting[other->tenant];
  const auto share = [this](const auto& line) { return line.second / WeightOf(line.first); };
  const auto most = std::max_element(waiting.begin(), waiting.end(),
                                     [&](const auto& a, const auto& b) { return share(a) < share(b); });
  if (most == waiting.end() || (waiting[turn.tenant] + 1) / WeightOf(turn.tenant) >= share(*most)) return false;
  for (auto last = waiting_.rbegin(); last != waiting_.rend(); ++last) {
    if ((*last)->tenant != most->first || (*last)->phase != Phase::kWaiting) continue;
    const TurnPtr other = *last;  // What follows takes it out.
    Fail(*other, common::WithRetryInfo(
                     absl::ResourceExhaustedError(absl::StrCat("too many requests of the tenant: ", most->second,
                                                               " wait, and others want to, too")),
                     ComeAgain(world_)));
    return true;
  }
  return false;
}

void TurnCore::StartWaiting() {
  // Called for every arrival: those of a flood are not to cost a look at the whole line each.
  if (waiting_.empty() || RunsMost()) return;
  PoolUse active = ActiveByPool();
  std::vector<TurnPtr> line(waiting_.begin(), waiting_.end());
  const auto same = [&line](const TurnPtr& turn) { return turn->tenant == line.front()->tenant; };
  if (!std::all_of(line.begin(), line.end(), same)) {
    std::vector<std::string> tenants;
    for (const TurnPtr& turn : line) tenants.push_back(turn->tenant);
    const auto weight = [this](absl::string_view tenant) { return WeightOf(tenant); };
    std::vector<TurnPtr> fair;
    for (const size_t i : FairOrder(HeldByTenant(""), tenants, weight)) fair.push_back(line[i]);
    line = std::move(fair);
  }
  for (const TurnPtr& turn : line) {
    // Others need not wait for its session to close.
    if (!Fits(*turn, active) || !SessionFree(*turn)) continue;
    const auto at = std::find(waiting_.begin(), waiting_.end(), turn);
    if (at == waiting_.end()) continue;
    waiting_.erase(at);
    StartTurn(turn);
    if (turn->Active()) ++active[turn->pool];
  }
}

void TurnCore::StartTurn(const TurnPtr& turn) {
  if (turn->phase == Phase::kYielded) {
    --yielded_;
    kept_.Use(turn->pool, turn->tenant);
    return Park(*turn);
  }
  running_[turn->id] = turn;
  if (!turn->session_id.empty()) {
    Session& session = sessions_.Of(turn->session_id);
    if (session.next == turn) session.next = nullptr;
    session.turn = turn;
    turn->session = &session;
  }
  if (!turn->kind->takes_slot()) return RunExclusive(turn);
  if (const Pool* pool = placement_.ChoosePool(*turn, ActiveByPool()); pool != nullptr) turn->pool = pool->name;
  kept_.Use(turn->pool, turn->tenant);
  if (const absl::Status status = placement_.CheckServed(*turn); !status.ok()) {
    turn->phase = Phase::kComputed;
    return Fail(*turn, status);
  }
  if (turn->kind->generates()) metrics_->prompt_tokens.Increment(static_cast<double>(turn->prompt.size()));
  if (turn->session != nullptr) return OpenTurn(turn);
  if (turn->kind->generates()) turn->answer.emplace(turn->model->tokenizer, turn->spec);
  Park(*turn);
}

void TurnCore::EndCall(Turn& turn, const absl::Status& status) {
  by_call_.erase(turn.call);
  CloseStreams(turn, status);
}

void TurnCore::CloseStreams(Turn& turn, const absl::Status& status) {
  if (!turn.kind->IsOpen()) return;
  metrics_->CountError(status);
  if (absl::IsInternal(status) || absl::IsDataLoss(status) || absl::IsUnknown(status)) {
    common::LogError("call_failed", {{"session", turn.session_id}, {"status", status}});
  }
  turn.kind->Close(status);
}

void TurnCore::Fail(Turn& turn, const absl::Status& status) {
  EndCall(turn, status);
  Abandon(turn);
}

void TurnCore::Refuse(Turn& turn, const absl::Status& status) {
  if (!turn.HasLog()) return Fail(turn, status);
  turn.phase = Phase::kComputed;
  turn.error = status;
  turn.answer->Finish(v1::FINISH_REASON_ERROR, absl::nullopt, "");
}

void TurnCore::Abandon(Turn& turn) {
  if (turn.stopped) return;
  turn.stopped = true;
  switch (turn.phase) {
    case Phase::kWaiting: {
      const auto same = [&turn](const TurnPtr& other) { return other.get() == &turn; };
      Session* const session = sessions_.Find(turn.session_id);
      if (session != nullptr && session->next != nullptr && same(session->next)) session->next = nullptr;
      turn.phase = Phase::kComputed;
      const auto waiting = std::find_if(waiting_.begin(), waiting_.end(), same);
      if (waiting != waiting_.end()) waiting_.erase(waiting);  // May be the last that holds the turn.
      return;
    }
    case Phase::kOpening:
    case Phase::kLocating:
      return;  // Who comes back from the store sees that it was stopped.
    case Phase::kParked:
      turn.phase = Phase::kComputed;
      return;
    case Phase::kYielded: {
      --yielded_;
      turn.phase = Phase::kComputed;
      const auto waiting = std::find_if(waiting_.begin(), waiting_.end(),
                                        [&turn](const TurnPtr& other) { return other.get() == &turn; });
      if (waiting != waiting_.end()) waiting_.erase(waiting);  // running_ has it too.
      return;
    }
    case Phase::kAttaching:
      return RemoveSequence(turn);
    case Phase::kRunning:
      if (!turn.HasLog() || turn.abandoned) return RemoveSequence(turn);
      if (!turn.Going()) return SaveAndRetire(turn);
      turn.yielding = false;
      return Halt(turn);  // Retired once it is known where its slot is.
    case Phase::kComputed:
      return;
  }
}

}  // namespace rwkv::router
