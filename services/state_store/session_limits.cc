#include "services/state_store/session_limits.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"

namespace rwkv::state_store {
namespace {

constexpr absl::Duration kOpenTurnWithoutTtl = absl::Hours(1);
constexpr absl::Duration kRetryDelay = absl::Seconds(30);
constexpr int kEndsPerCall = 64;  // So that one call does not pay for all.
// Of the longest idle sessions so many are looked at for one that may end; the fewer, unless none of them may.
constexpr int kFewSeen = 64, kManySeen = 4096;

// One that cannot be ended since its rows are damaged stays, and those behind it are ended.
absl::StatusOr<bool> UnlessDamaged(const IdleSession& session, absl::StatusOr<bool> ended) {
  if (!absl::IsDataLoss(ended.status())) return ended;
  common::LogError("session_damaged", {{"session", session.session_id}, {"error", ended.status()}});
  return false;
}

constexpr char kEndedName[] = "rwkv_state_store_sessions_ended_total";
constexpr char kEndedHelp[] = "Sessions that ended: idle for too long, to make room within a bound, or deleted.";
constexpr char kRefusedName[] = "rwkv_state_store_full_refusals_total";
constexpr char kRefusedHelp[] = "New sessions and turns refused since the store is full, by bound.";

}  // namespace

absl::StatusOr<SessionLimits::WhenFull> SessionLimits::ParseWhenFull(absl::string_view text) {
  if (text == "refuse") return WhenFull::kRefuse;
  if (text == "evict") return WhenFull::kEvict;
  return absl::InvalidArgumentError(absl::StrCat("--when_full=", text, ", want refuse or evict"));
}

absl::Status SessionLimits::Check(const Options& options) {
  const auto negative = [](const char* flag, const auto& value) {
    return absl::InvalidArgumentError(absl::StrCat(flag, "=", value, ", want 0 (none) or more"));
  };
  if (options.idle_ttl < absl::ZeroDuration()) {
    return negative("--session_idle_ttl", absl::FormatDuration(options.idle_ttl));
  }
  if (options.max_stored_bytes < 0) return negative("--max_stored_bytes", options.max_stored_bytes);
  if (options.max_sessions < 0) return negative("--max_sessions", options.max_sessions);
  if (options.ends_per_sweep < 1) return absl::InvalidArgumentError("ends_per_sweep is below 1");
  if (options.when_full == WhenFull::kEvict && options.max_stored_bytes == 0 && options.max_sessions == 0) {
    return absl::InvalidArgumentError("--when_full=evict without --max_stored_bytes or --max_sessions: never full");
  }
  return absl::OkStatus();
}

std::string SessionLimits::HowSessionsEnd(const Options& options) {
  std::vector<std::string> ways;
  if (options.idle_ttl > absl::ZeroDuration()) {
    ways.push_back(absl::StrCat("after ", absl::FormatDuration(options.idle_ttl), " without use"));
  }
  if (options.when_full == WhenFull::kEvict) ways.push_back("when the store is full, the longest unused first");
  if (ways.empty()) return "";
  return absl::StrCat("it may have ended: sessions end ", absl::StrJoin(ways, ", and "));
}

SessionLimits::SessionLimits(const Options& options, Catalog* catalog, RecordStore* records, End end,
                             common::Clock* clock, common::Metrics* metrics)
    : options_(options),
      catalog_(catalog),
      records_(records),
      end_(std::move(end)),
      clock_(clock),
      ended_idle_total_(metrics->Counter(kEndedName, kEndedHelp, {{"reason", "idle"}})),
      ended_sessions_total_(metrics->Counter(kEndedName, kEndedHelp, {{"reason", "max_sessions"}})),
      ended_bytes_total_(metrics->Counter(kEndedName, kEndedHelp, {{"reason", "max_stored_bytes"}})),
      refused_sessions_total_(metrics->Counter(kRefusedName, kRefusedHelp, {{"bound", "max_sessions"}})),
      refused_bytes_total_(metrics->Counter(kRefusedName, kRefusedHelp, {{"bound", "max_stored_bytes"}})),
      stored_bytes_gauge_(
          metrics->Gauge("rwkv_state_store_stored_bytes", "What --max_stored_bytes bounds: state records and logs.")) {
  stored_bytes_gauge_.Set(static_cast<double>(stored_bytes()));
}

SessionLimits::Place::~Place() {
  if (limits_ == nullptr) return;
  absl::MutexLock lock(&limits_->mu_);
  --limits_->places_;
}

int64_t SessionLimits::stored_bytes() const {
  const CatalogCounts counts = catalog_->counts();
  return records_->bytes() - counts.prefix_record_bytes + counts.tokens * kBytesPerToken;
}

bool SessionLimits::TooManyBytes(int64_t more) const {
  return options_.max_stored_bytes > 0 && stored_bytes() + more > options_.max_stored_bytes;
}

bool SessionLimits::TooManySessions(int64_t more) const {
  return options_.max_sessions > 0 && catalog_->counts().sessions + more > options_.max_sessions;
}

absl::StatusOr<bool> SessionLimits::EndOne(const IdleSession& session, const char* reason, prometheus::Counter& ended) {
  // If it was used meanwhile, it stays.
  RWKV_ASSIGN_OR_RETURN(const bool did, UnlessDamaged(session, end_(session.session_id, session.idle_since)));
  if (!did) return false;
  ended.Increment();
  common::LogInfo("session_ended", {{"session", session.session_id},
                                    {"reason", reason},
                                    {"idle", absl::FormatDuration(clock_->Now() - session.idle_since)}});
  return true;
}

absl::Status SessionLimits::Evict(absl::FunctionRef<bool()> full, absl::string_view keep, const char* reason,
                                  prometheus::Counter& ended, int* budget) {
  for (int seen = kFewSeen; full();) {
    RWKV_ASSIGN_OR_RETURN(const std::vector<IdleSession> oldest, catalog_->OldestSessions(clock_->Now(), seen));
    bool any = false;
    for (const IdleSession& session : oldest) {
      if (*budget == 0 || !full()) return absl::OkStatus();
      if (session.turn_open || session.session_id == keep) continue;
      RWKV_ASSIGN_OR_RETURN(const bool did, EndOne(session, reason, ended));
      if (!did) continue;
      any = true;
      --*budget;
    }
    if (!any && seen == kManySeen) return absl::OkStatus();
    if (!any) seen = kManySeen;
  }
  return absl::OkStatus();
}

absl::Status SessionLimits::Refuse(const std::string& bound, prometheus::Counter& refused) const {
  refused.Increment();
  const char* const help =
      options_.when_full == WhenFull::kEvict
          ? "and no session is idle that could make room: wait for turns to end, or raise the bound"
          : "delete sessions, let idle ones end (--session_idle_ttl), raise the bound, or let the "
            "longest idle make room (--when_full=evict)";
  return common::WithRetryInfo(
      common::WithErrorInfo(absl::ResourceExhaustedError(absl::StrCat("the state store is full: ", bound, "; ", help)),
                            "STORE_FULL"),
      kRetryDelay);
}

absl::Status SessionLimits::MakeRoomForBytes(absl::string_view keep) {
  const auto full = [this] { return TooManyBytes(1); };
  int budget = kEndsPerCall;
  if (options_.when_full == WhenFull::kEvict) {
    RWKV_RETURN_IF_ERROR(Evict(full, keep, "max_stored_bytes", ended_bytes_total_, &budget));
  }
  // What many small ones are in the way of is let in, and the sweep goes on.
  if (!full() || budget == 0) return absl::OkStatus();
  return Refuse(absl::StrCat(stored_bytes(), " bytes are stored, --max_stored_bytes=", options_.max_stored_bytes),
                refused_bytes_total_);
}

absl::Status SessionLimits::AdmitTurn(absl::string_view keep) {
  if (!TooManyBytes(1)) return absl::OkStatus();
  absl::MutexLock lock(&mu_);
  return MakeRoomForBytes(keep);
}

absl::StatusOr<SessionLimits::Place> SessionLimits::AdmitSession(absl::string_view keep) {
  if (options_.max_sessions == 0 && options_.max_stored_bytes == 0) return Place(nullptr);
  absl::MutexLock lock(&mu_);
  RWKV_RETURN_IF_ERROR(MakeRoomForBytes(keep));
  const auto full = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return TooManySessions(places_ + 1); };
  int budget = kEndsPerCall;
  if (options_.when_full == WhenFull::kEvict) {
    RWKV_RETURN_IF_ERROR(Evict(full, keep, "max_sessions", ended_sessions_total_, &budget));
  }
  if (full()) {
    return Refuse(absl::StrCat(catalog_->counts().sessions, " sessions, --max_sessions=", options_.max_sessions),
                  refused_sessions_total_);
  }
  ++places_;
  return Place(this);
}

absl::Status SessionLimits::EndIdle(int* budget) {
  const bool ttl = options_.idle_ttl > absl::ZeroDuration();
  if (!ttl && options_.when_full != WhenFull::kEvict) return absl::OkStatus();
  const absl::Time idle_before = clock_->Now() - (ttl ? options_.idle_ttl : kOpenTurnWithoutTtl);
  RWKV_ASSIGN_OR_RETURN(const std::vector<IdleSession> oldest, catalog_->OldestSessions(idle_before, kManySeen));
  for (const IdleSession& session : oldest) {
    if (*budget == 0) break;
    if (session.turn_open) {
      RWKV_ASSIGN_OR_RETURN(
          const bool did, UnlessDamaged(session, catalog_->EndIdleTurn(session.session_id, session.idle_since)));
      if (did) --*budget;
    } else if (ttl) {
      RWKV_ASSIGN_OR_RETURN(const bool did, EndOne(session, "idle", ended_idle_total_));
      if (did) --*budget;
    }
  }
  return absl::OkStatus();
}

absl::Status SessionLimits::Sweep() {
  int budget = options_.ends_per_sweep;
  absl::Status status = EndIdle(&budget);
  if (status.ok() && options_.when_full == WhenFull::kEvict) {
    absl::MutexLock lock(&mu_);
    status = Evict([this] { return TooManyBytes(0); }, "", "max_stored_bytes", ended_bytes_total_, &budget);
    if (status.ok()) {
      status = Evict([this] { return TooManySessions(0); }, "", "max_sessions", ended_sessions_total_, &budget);
    }
  }
  stored_bytes_gauge_.Set(static_cast<double>(stored_bytes()));
  return status;
}

}  // namespace rwkv::state_store
