// When sessions end without their clients' doing: after a time of idleness, and to make room within bounds.
//
//   sweep ──► idle for longer than idle_ttl: ended
//         └─► more is stored than the bounds allow, and kEvict: the longest idle are ended until it fits
//   a new session or turn at a bound ──► kEvict: the longest idle make room for it; kRefuse, or none is idle: refused
//
// A session with an open turn or with a lease that lives is never ended. A turn that is open while nobody has held the
// session's lease for a whole idle_ttl (without one: for an hour) is ended as CANCELLED, as the next turn would end it;
// from then on its session is idle.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "services/common/clock.h"
#include "services/common/metrics.h"
#include "services/state_store/catalog/catalog.h"
#include "services/state_store/records/record_store.h"

namespace rwkv::state_store {

// Thread-safe.
class SessionLimits {
 public:
  enum class WhenFull { kRefuse, kEvict };

  struct Options {
    absl::Duration idle_ttl;       // 0: sessions do not end by being idle.
    int64_t max_stored_bytes = 0;  // State records, and kBytesPerToken for each token of the logs. 0: no bound.
    int64_t max_sessions = 0;      // 0: no bound.
    WhenFull when_full = WhenFull::kRefuse;
    int ends_per_sweep = 1000;  // >= 1. The rest waits for the next sweep.
  };
  static constexpr int64_t kBytesPerToken = 8;  // Its id and log-probability.

  // "refuse" or "evict", else kInvalidArgument.
  static absl::StatusOr<WhenFull> ParseWhenFull(absl::string_view text);
  // kInvalidArgument, naming the flag: negative, or kEvict without a bound.
  static absl::Status Check(const Options& options);
  // For the words of kNotFound: how sessions end under `options`. Empty: they do not.
  static std::string HowSessionsEnd(const Options& options);

  // `end` is Catalog::EndIdleSession and deletes the records of what it frees. All outlive the limits.
  using End = std::function<absl::StatusOr<bool>(const std::string& session_id, absl::Time idle_before)>;
  SessionLimits(const Options& options, Catalog* catalog, RecordStore* records, End end, common::Clock* clock,
                common::Metrics* metrics);

  // The right to make one session. It counts until it goes, which is when the session counts.
  class Place {
   public:
    explicit Place(SessionLimits* limits) : limits_(limits) {}
    Place(Place&& other) noexcept : limits_(other.limits_) { other.limits_ = nullptr; }
    Place& operator=(Place&&) = delete;
    ~Place();

   private:
    SessionLimits* limits_;  // Null: none to give back.
  };
  // kResourceExhausted with RetryInfo: the store is full. The message names the bound, its value, and what helps.
  // `keep`: a session that is not to be ended for it.
  absl::StatusOr<Place> AdmitSession(absl::string_view keep) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status AdmitTurn(absl::string_view keep) ABSL_LOCKS_EXCLUDED(mu_);

  // What is due now, and no more than ends_per_sweep of it.
  absl::Status Sweep() ABSL_LOCKS_EXCLUDED(mu_);

  int64_t stored_bytes() const;

 private:
  bool TooManyBytes(int64_t more) const;
  bool TooManySessions(int64_t more) const;
  absl::Status EndIdle(int* budget);
  // Ends the longest idle until !full(), at most *budget of them.
  absl::Status Evict(absl::FunctionRef<bool()> full, absl::string_view keep, const char* reason,
                     prometheus::Counter& ended, int* budget) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status MakeRoomForBytes(absl::string_view keep) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status Refuse(const std::string& bound, prometheus::Counter& refused) const;
  absl::StatusOr<bool> EndOne(const IdleSession& session, const char* reason, prometheus::Counter& ended);

  const Options options_;
  Catalog* const catalog_;
  RecordStore* const records_;
  const End end_;
  common::Clock* const clock_;
  // One makes room at a time, so that none makes too much; it waits for the disk meanwhile. Never taken without bounds.
  absl::Mutex mu_;
  int64_t places_ ABSL_GUARDED_BY(mu_) = 0;  // Given and not gone.
  prometheus::Counter& ended_idle_total_;
  prometheus::Counter& ended_sessions_total_;
  prometheus::Counter& ended_bytes_total_;
  prometheus::Counter& refused_sessions_total_;
  prometheus::Counter& refused_bytes_total_;
  prometheus::Gauge& stored_bytes_gauge_;
};

}  // namespace rwkv::state_store
