#include "services/router/core/turn_core.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "services/common/logging.h"
#include "services/router/core/trace_stage.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

}  // namespace

TurnCore::TurnCore(const Options& options, World* world, state_store::CatalogClient* catalog, RouterMetrics* metrics)
    : context_(options, world, catalog, metrics),
      placement_(options.max_running),
      // What ends elsewhere is told to those further down; it happens in events, so that they are there by then.
      sessions_(context_, [this](Session& session) { commits_.OnLeaseLost(session); }),
      line_(context_, turns_, placement_, sessions_),
      gauges_(context_, turns_, line_, placement_),
      streams_(context_, &turns_),
      prefixes_(context_, placement_),
      saves_(context_, placement_, &sessions_, &prefixes_,
             [this](const PendingSave& save, bool is_whole, const absl::Status& status) {
               const TurnPtr turn = turns_.Find(save.turn_id);
               // What a turn without a session left behind is swept as an orphan.
               if (turn != nullptr) progress_.OnSaveEnded(*turn, save, is_whole, status);
             }),
      going_on_(context_, &saves_),
      slots_(context_, placement_, &turns_, &line_, &saves_),
      ends_(&streams_, &slots_, &line_, &sessions_),
      yields_(context_, turns_, line_, placement_, saves_, slots_),
      commits_(context_, turns_, placement_, &saves_, &slots_, &ends_),
      lane_keeper_(context_, turns_, &placement_, &saves_, &slots_, &ends_),
      commands_(context_, turns_, saves_, going_on_),
      results_(context_, turns_, &slots_, &ends_, &gauges_),
      progress_(context_, going_on_, &saves_, &streams_, &slots_, &ends_),
      attaching_(context_, placement_, &turns_, &prefixes_, &slots_, &ends_),
      seating_(context_, placement_, attaching_, &prefixes_, &streams_, &slots_, &ends_),
      opener_(context_, placement_, &sessions_, &streams_, &slots_, &ends_),
      arrivals_(context_, placement_, opener_, &turns_, &sessions_, &line_, &streams_, &slots_, &ends_) {}

void TurnCore::Cancel(CallId call) {
  const TurnPtr turn = turns_.FindCall(call);
  if (turn == nullptr) return;
  streams_.End(*turn, absl::CancelledError("the client is gone"));
  // What has its end is brought to it; all else waits in the log for the client to come back.
  if (!turn->decided()) ends_.Abandon(*turn);
}

void TurnCore::Handle(uint64_t epoch, int stage, const v1::ExecuteResponse& response) {
  TurnLane* const lane = placement_.Find(epoch);
  if (lane == nullptr) return;
  switch (response.result_case()) {
    case v1::ExecuteResponse::kAttached:
      return attaching_.OnAnswer(response.attached());
    case v1::ExecuteResponse::kLogits:
      return results_.OnLogits(response.logits());
    case v1::ExecuteResponse::kStep:
      return results_.OnStep(*lane, response.step());
    case v1::ExecuteResponse::kSaved:
      return saves_.OnSaved(response.saved());
    case v1::ExecuteResponse::kStopped:
      return results_.OnStopped(response.stopped());
    case v1::ExecuteResponse::kOpened:
    case v1::ExecuteResponse::RESULT_NOT_SET:
      context_.world->EndEpoch(epoch, absl::InternalError(absl::StrCat("stage ", stage, " sent an answer to nothing")));
      return;
  }
}

void TurnCore::BeginDrain(absl::Time pause_at) {
  pause_at_ = pause_at;
  common::LogInfo("drain_begins", {{"running", turns_.running().size()}, {"waiting", line_.size()}});
  for (const TurnPtr& turn : line_.turns()) {
    if (turn->phase() == Phase::kWaiting) ends_.Fail(*turn, DrainingStatus());
  }
}

void TurnCore::Stop() {
  const absl::Status status = DrainingStatus();
  for (const TurnPtr& turn : line_.turns()) ends_.Fail(*turn, status);
  for (const auto& [id, turn] : turns_.running()) ends_.Fail(*turn, status);
}

void TurnCore::Touch() {
  turns_.Touch();
  sessions_.Touch();
  saves_.Touch();
  line_.Forget();
}

void TurnCore::Sweep() {
  line_.ExpireKept();
  arrivals_.StartWaiting();
  SweepTurns();
  arrivals_.RefuseOverdue();
  yields_.Sweep();
  lane_keeper_.SweepClosing();
  commits_.Sweep();
  saves_.Sweep();
  sessions_.Sweep();
  SweepDrain();
  arrivals_.StartWaiting();
  for (const auto& [epoch, lane] : placement_.lanes()) commands_.Send(*lane);
  lane_keeper_.Watch();
  gauges_.Update();
}

void TurnCore::SweepTurns() {
  turns_.marks().MarkDue(context_.Now(), context_.options.tick);
  seating_.TouchStranded(turns_);
  WatchSaveRoom();
  // In the order of their arrival. Whoever is marked by those behind it is looked at by the next sweep.
  for (absl::optional<uint64_t> id = turns_.marks().Take(0); id.has_value(); id = turns_.marks().Take(*id)) {
    const auto at = turns_.running().find(*id);
    if (at == turns_.running().end()) continue;
    const TurnPtr turn = at->second;
    SweepTurn(turn);
    Look(turn);
    WatchSaveRoom();
    if (turn->phase() != Phase::kComputed || turn->session != nullptr || !turn->IsCommitted() || turn->kind->IsOpen()) {
      continue;
    }
    slots_.DropOwn(*turn);
    turns_.Erase(turn);
  }
}

void TurnCore::SweepTurn(const TurnPtr& turn) {
  if (turn->phase() == Phase::kParked) seating_.Advance(turn);
  if (turn->phase() == Phase::kRunning) progress_.Advance(turn);
  if (const absl::Status status = streams_.Pump(*turn); !status.ok()) ends_.Fail(*turn, status);
  if (turn->phase() == Phase::kRunning) progress_.Advance(turn);  // Sending may have made room to decode.
  if (turn->phase() == Phase::kComputed && turn->session != nullptr && turn->IsCommitted()) {
    sessions_.Touch(*turn->session);
    turn->session->turn = nullptr;
    turn->session = nullptr;
  }
  TraceStage(*turn);
}

void TurnCore::Look(const TurnPtr& turn) {
  yields_.Look(*turn);
  commits_.Look(*turn);
  TurnTable::CountGoing(*turn, turn->Going());
  turns_.marks().WakeAt(turn->id, std::min(seating_.LookAgain(*turn), streams_.StuckAt(*turn)));
  // Not every kind of stream tells when there is room, and none tells of every message.
  turns_.marks().Poll(turn->id, turn->stalled_since != absl::InfiniteFuture());
}

void TurnCore::WatchSaveRoom() {
  if (saves_.has_room() == had_save_room_) return;
  had_save_room_ = saves_.has_room();
  for (const auto& [sequence, turn] : turns_.seated()) turn->Touch();
}

void TurnCore::SweepDrain() {
  if (!context_.draining) return;
  if (context_.Now() >= pause_at_) {
    pause_at_ = absl::InfiniteFuture();  // No more come.
    for (const auto& [id, turn] : turns_.running()) {
      if (!turn->stopped && !turn->decided()) ends_.Fail(*turn, DrainingStatus());
    }
  }
  if (turns_.running().empty() && saves_.empty() && sessions_.empty()) context_.world->Drained();
}

}  // namespace rwkv::router
