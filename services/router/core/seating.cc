#include "services/router/core/seating.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "services/common/grpc_status.h"
#include "services/router/core/feeding.h"
#include "services/router/core/trace_stage.h"
#include "services/router/core/turn_lane.h"
#include "services/router/core/turn_opening.h"
#include "services/router/core/turn_trace.h"
#include "services/router/core/world.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;

}  // namespace

Seating::Seating(const CoreContext& context, const Placement& placement, const Attaching& attaching, Prefixes* prefixes,
                 ClientStreams* streams, TurnSlots* slots, TurnEnds* ends)
    : context_(context),
      placement_(placement),
      attaching_(attaching),
      prefixes_(prefixes),
      streams_(streams),
      slots_(slots),
      ends_(ends) {}

void Seating::Advance(const TurnPtr& turn) const {
  const absl::Time now = context_.Now();
  if (const absl::Status status = placement_.CheckServed(*turn); !status.ok()) return ends_->Fail(*turn, status);
  const bool has_lane = placement_.ChooseLane(*turn) != nullptr;
  const bool is_lost = turn->lost_since != absl::InfiniteFuture();
  if (has_lane && is_lost && slots_->HasNoPlace(*turn)) return slots_->WaitForPlace(turn);
  if (has_lane && now >= turn->not_before && !AwaitsSave(*turn)) return Locate(turn);
  const absl::Duration parked = now - turn->parked_since;
  if (!has_lane && IsStranded(*turn) && context_.world->OthersDrive(turn->pool())) {
    return ends_->Fail(*turn,
                       common::WithRetryInfo(
                           absl::UnavailableError("this router has lost its pipeline; another goes on with the turn"),
                           context_.options.retry_delay));
  }
  if (parked > context_.options.outage_timeout) {
    ends_->Fail(*turn,
                common::WithRetryInfo(absl::UnavailableError(absl::StrCat(
                                          "no pipeline for ", absl::FormatDuration(context_.options.outage_timeout),
                                          ": ", context_.world->WhyNoLane().message())),
                                      absl::Seconds(1)));
  }
}

bool Seating::AwaitsSave(const Turn& turn) const {
  return turn.yielded && turn.saves > 0 && context_.Now() - turn.parked_since < kSaveWait;
}

bool Seating::IsStranded(const Turn& turn) const {
  return turn.named && turn.HasLog() && context_.Now() - turn.parked_since > context_.options.handover_after;
}

absl::Time Seating::LookAgain(const Turn& turn) {
  const bool has_lane = turn.phase() == Phase::kParked && placement_.ChooseLane(turn) != nullptr;
  const bool is_stranded = turn.phase() == Phase::kParked && !has_lane && IsStranded(turn);
  if (is_stranded) {
    stranded_[turn.pool()].insert(turn.id);
  } else if (const auto of_pool = stranded_.find(turn.pool()); of_pool != stranded_.end()) {
    of_pool->second.erase(turn.id);
    if (of_pool->second.empty()) stranded_.erase(of_pool);
  }
  if (turn.phase() != Phase::kParked) return absl::InfiniteFuture();
  // Whether there is a place for it depends on all others.
  if (has_lane && turn.lost_since != absl::InfiniteFuture()) turn.Touch();
  const absl::Time now = context_.Now();
  absl::Time again = turn.parked_since + context_.options.outage_timeout;
  if (turn.not_before > now) again = std::min(again, turn.not_before);
  if (AwaitsSave(turn)) again = std::min(again, turn.parked_since + kSaveWait);
  if (!is_stranded && turn.named && turn.HasLog()) {
    again = std::min(again, turn.parked_since + context_.options.handover_after);
  }
  return again;
}

void Seating::TouchStranded(const TurnTable& turns) const {
  for (const auto& [pool, of_pool] : stranded_) {
    if (!context_.world->OthersDrive(pool)) continue;
    for (const uint64_t id : of_pool) turns.running().at(id)->Touch();
  }
}

void Seating::Locate(const TurnPtr& turn) const {
  turn->snapshot.Clear();
  turn->warm_source = absl::nullopt;
  turn->tail.clear();
  turn->prefix.attached = false;
  prefixes_->Plan(*turn);
  if (!turn->kind->wants_snapshot() && LocateWarm(turn, 0, turn->StateEnd())) return;
  absl::optional<v1::FindPrefixRequest> prefix = prefixes_->Lookup(*turn);
  if (turn->session != nullptr) return LocateSnapshot(turn, std::move(prefix));
  turn->snapshot = turn->own_snapshot;
  if (prefix.has_value() && turn->snapshot.snapshot_id().empty()) return LocatePrefix(turn, *std::move(prefix));
  attaching_.Admit(turn, turn->snapshot.position());
}

void Seating::LocateSnapshot(const TurnPtr& turn, absl::optional<v1::FindPrefixRequest> prefix) const {
  turn->set_phase(Phase::kLocating);
  TraceStage(*turn);
  v1::FindSnapshotRequest find;
  find.set_session_id(turn->session_id);
  find.set_at_or_before(std::min(turn->StateEnd(), turn->snapshot_limit));
  find.set_model_fingerprint(turn->model->info.fingerprint());
  const absl::optional<uint64_t> base = turn->session->base_position;
  const bool restart = turn->no_snapshot || turn->patience.LeavesSnapshots(context_.Now());
  if (restart && base.has_value()) find.set_at_or_before(*base);
  const auto work = [this, find = std::move(find), fresh = restart && !base.has_value(), base, begin = turn->begin,
                     prefix = std::move(prefix)] {
    Located located;
    const absl::Time deadline = context_.StoreDeadline();
    if (!fresh) {
      absl::StatusOr<v1::FindSnapshotResponse> found = context_.catalog->FindSnapshot(find, deadline);
      located.status = found.status();
      if (!found.ok()) return located;
      located.manifest = *std::move(found->mutable_manifest());
      if (base.has_value() && located.manifest.snapshot_id().empty()) {
        located.status = BaseLost(find.session_id(), *base, "the store does not know it");
        return located;
      }
    }
    if (prefix.has_value()) prefixes_->Find(*prefix, &located);
    if (located.manifest.position() >= begin) return located;
    v1::ReadTokensRequest read;
    read.set_session_id(find.session_id());
    read.set_begin(located.manifest.position());
    read.set_end(begin);
    absl::StatusOr<std::vector<uint32_t>> tail = context_.catalog->ReadTokens(read, deadline);
    located.status = tail.status();
    if (tail.ok()) located.tail = *std::move(tail);
    return located;
  };
  if (!RunStoreJob<Located>(context_.world, Traced<Located>(turn->trace, work),
                            [this, turn](Located located) { OnLocated(turn, std::move(located)); })) {
    TryLater(*turn);
  }
}

void Seating::LocatePrefix(const TurnPtr& turn, v1::FindPrefixRequest find) const {
  turn->set_phase(Phase::kLocating);
  TraceStage(*turn);
  const auto work = [this, find = std::move(find)] {
    Located located;
    prefixes_->Find(find, &located);
    return located;
  };
  if (RunStoreJob<Located>(context_.world, Traced<Located>(turn->trace, work),
                           [this, turn](Located located) { OnLocated(turn, std::move(located)); })) {
    return;
  }
  attaching_.Admit(turn, 0);
}

bool Seating::LocateWarm(const TurnPtr& turn, uint64_t at_least, uint64_t at_most) const {
  if (turn->no_warm) return false;
  absl::optional<Scheduler::WarmSlot> warm;
  TurnLane* lane = nullptr;
  for (const auto& [epoch, other] : placement_.lanes()) {
    if (!placement_.IsOpenTo(*turn, *other)) continue;
    const absl::optional<Scheduler::WarmSlot> found =
        other->scheduler.FindWarm(TurnSlots::WarmSession(*turn), TurnSlots::WarmBranch(*turn), at_most);
    if (!found.has_value() || (warm.has_value() && warm->position >= found->position)) continue;
    warm = found;
    lane = other.get();
  }
  if (!warm.has_value() || warm->position < at_least) return false;
  if (!attaching_.AdmitWarm(turn, *lane, *warm)) return false;
  if (warm->position >= turn->begin) {
    FeedKnown(*turn);
  } else {
    ReadTail(turn, warm->position);
  }
  return true;
}

void Seating::ReadTail(const TurnPtr& turn, uint64_t position) const {
  turn->tail_pending = true;
  v1::ReadTokensRequest read;
  read.set_session_id(turn->session_id);
  read.set_begin(position);
  read.set_end(turn->begin);
  using Tail = absl::StatusOr<std::vector<uint32_t>>;
  const auto then = [this, turn, sequence = turn->sequence](Tail tail) {
    if (turn->sequence != sequence) return;
    turn->Touch();
    turn->tail_pending = false;
    if (!tail.ok()) return ends_->Fail(*turn, context_.StoreError(tail.status()));
    turn->tail = *std::move(tail);
    FeedKnown(*turn);
  };
  const auto work = [this, read = std::move(read)] {
    return Tail(context_.catalog->ReadTokens(read, context_.StoreDeadline()));
  };
  if (RunStoreJob<Tail>(context_.world, Traced<Tail>(turn->trace, work), then)) return;
  slots_->Remove(*turn);
  TryLater(*turn);
}

void Seating::TryLater(Turn& turn) const {
  slots_->Park(turn);
  turn.not_before = context_.Now() + context_.options.retry_delay;
}

void Seating::OnLocated(const TurnPtr& turn, Located located) const {
  if (turn->stopped) {
    turn->set_phase(Phase::kComputed);
    return;
  }
  if (!located.status.ok()) {
    turn->set_phase(Phase::kComputed);
    return ends_->Fail(*turn, context_.StoreError(located.status));
  }
  if (turn->kind->wants_snapshot()) {
    if (!located.manifest.snapshot_id().empty() && located.manifest.position() == turn->begin) {
      turn->set_phase(Phase::kComputed);
      turn->kind->OnSnapshot(*turn, std::move(located.manifest));
      return streams_->End(*turn, absl::OkStatus());
    }
    if (LocateWarm(turn, located.manifest.position(), turn->begin)) return;
  }
  prefixes_->OnFound(*turn, located);
  turn->snapshot = std::move(located.manifest);
  turn->tail = std::move(located.tail);
  attaching_.Admit(turn, turn->snapshot.position());
}

}  // namespace rwkv::router
