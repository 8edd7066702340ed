// How both clients call a store: attempts, retries, and which of several stores.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/random/random.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "services/common/tracing/trace_context.h"
#include "services/state_store/client/store_choice.h"

namespace rwkv::state_store {

// A store that restarts is away for about a second. Whoever must outlast that has its own loop; this only hides a
// connection that broke between two calls.
inline constexpr int kMaxAttempts = 4;
// Of several stores at least so many for each; the first at each comes at once.
inline constexpr int kMaxAttemptsPerStore = 2;
// One of several stores that says nothing for so long is left for another. A record has a second more per 10 MB.
inline constexpr absl::Duration kAttemptLimit = absl::Seconds(5);
inline constexpr absl::Duration kLastBackoffOfSeveral = absl::Milliseconds(500);
inline constexpr double kRecordBytesPerSecond = 10e6;
inline constexpr absl::Duration kFirstBackoff = absl::Milliseconds(20);  // Then 4x more each time: 20, 80, 320 ms.

// And the trace that the call is part of.
inline void SetDeadline(grpc::ClientContext& context, absl::Time deadline) {
  common::AddTrace(&context);
  if (deadline != absl::InfiniteFuture()) context.set_deadline(absl::ToChronoTime(deadline));
}

inline const absl::Status& StatusOf(const absl::Status& status) { return status; }
template <typename T>
const absl::Status& StatusOf(const absl::StatusOr<T>& result) {
  return result.status();
}

// How long a call at one of the stores may take.
inline absl::Time AttemptDeadline(const StoreChoice& stores, absl::Time deadline, uint64_t bytes = 0) {
  if (stores.size() == 1) return deadline;
  return std::min(deadline, absl::Now() + kAttemptLimit + absl::Seconds(bytes / kRecordBytesPerSecond));
}

// Makes one whole call, attempt(store, deadline), and learns from what came of it.
template <typename Attempt>
auto Tried(StoreChoice& stores, absl::Time deadline, absl::Time attempt_deadline, Attempt attempt) {
  const size_t store = stores.Choose(deadline);
  auto result = attempt(store, attempt_deadline);
  // Nobody cancels here: it is a store that ends with calls under way, done or not.
  if (absl::IsCancelled(StatusOf(result))) {
    result = absl::UnavailableError(absl::StrCat("the store ended the call: ", StatusOf(result).message()));
  }
  const absl::Status& status = StatusOf(result);
  if (absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status)) {
    stores.Failed(store);
  } else {
    stores.Answered(store);
  }
  return result;
}

// `bytes`: of the record, if it is one.
template <typename Attempt>
auto Retried(StoreChoice& stores, absl::Time deadline, Attempt attempt, uint64_t bytes = 0) {
  absl::BitGen random;
  const int others = static_cast<int>(stores.size()) - 1;
  const int most = std::max(kMaxAttempts, kMaxAttemptsPerStore * (others + 1));
  absl::Duration backoff = kFirstBackoff;
  for (int i = 1;; ++i) {
    const absl::Time attempt_deadline = AttemptDeadline(stores, deadline, bytes);
    auto result = Tried(stores, deadline, attempt_deadline, attempt);
    const absl::Status& status = StatusOf(result);
    const bool again = absl::IsUnavailable(status) || (absl::IsDeadlineExceeded(status) && attempt_deadline < deadline);
    const absl::Duration wait = i <= others ? absl::ZeroDuration() : backoff * absl::Uniform(random, 0.5, 1.0);
    if (!again || i == most || absl::Now() + wait >= deadline) return result;
    if (i <= others) continue;
    absl::SleepFor(wait);
    backoff *= 4;
    if (others > 0) backoff = std::min(backoff, kLastBackoffOfSeveral);
  }
}

template <typename Stub>
std::vector<std::unique_ptr<Stub>> StubsOf(const std::vector<std::shared_ptr<grpc::Channel>>& channels) {
  std::vector<std::unique_ptr<Stub>> stubs;
  for (const std::shared_ptr<grpc::Channel>& channel : channels) stubs.push_back(std::make_unique<Stub>(channel));
  return stubs;
}

inline size_t AnyHome(size_t stores) {
  absl::BitGen random;
  return absl::Uniform<size_t>(random, 0, stores);
}

}  // namespace rwkv::state_store
