// What tests of turns have in common: made-up prompts, waiting for an answer.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/router/testing/fake_cluster.h"
#include "services/worker/client/fake_worker.h"

namespace rwkv::router {

inline constexpr uint32_t kVocabulary = 1000;  // Of FakePipeline.

inline std::vector<uint32_t> Prompt(uint32_t salt, int count = 10) {
  std::vector<uint32_t> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back((salt * 31 + i * 7 + 1) % kVocabulary);
  return tokens;
}

inline std::vector<uint32_t> Concat(std::vector<uint32_t> a, const std::vector<uint32_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

inline absl::StatusOr<v1::FindSnapshotResponse> NewestSnapshot(FakeCluster& cluster, const std::string& session) {
  v1::FindSnapshotRequest find;
  find.set_session_id(session);
  find.set_at_or_before(1000);
  find.set_model_fingerprint(cluster.router().model()->info.fingerprint());
  return cluster.store().FindSnapshot(find, absl::Now() + kTestLimit);
}

inline v1::Session GetSession(FakeCluster& cluster, const std::string& session) {
  v1::GetSessionRequest get;
  get.set_session_id(session);
  const auto got = cluster.store().GetSession(get, absl::Now() + kTestLimit);
  EXPECT_TRUE(got.ok()) << got.status();
  return got.ok() ? got->session() : v1::Session();
}

// Runs `call` with a callback and waits for it.
template <typename Result, typename Starter>
absl::StatusOr<Result> Await(Starter start) {
  absl::Notification done;
  absl::StatusOr<Result> result = absl::UnknownError("no answer");
  start([&](absl::StatusOr<Result> answer) {
    result = std::move(answer);
    done.Notify();
  });
  if (!Waited(done.WaitForNotificationWithTimeout(WaitLimit()))) return absl::DeadlineExceededError("no answer");
  return result;
}

// Cuts the session's log at `position`, as Sessions.Rewind does.
inline absl::Status Rewind(FakeCluster& cluster, TurnManager& router, const std::string& session, uint64_t position) {
  const auto rewind = [&](const v1::AcquireLeaseResponse& held) {
    v1::RewindSessionRequest request;
    *request.mutable_lease() = held.lease();
    request.set_log_branch(held.log_branch());
    request.set_position(position);
    return cluster.store().RewindSession(request, absl::Now() + kTestLimit).status();
  };
  return Await<int>([&](auto done) {
           router.Exclusive(router.NewCall(), session, false, rewind, [done](const absl::Status& status) {
             done(status.ok() ? absl::StatusOr<int>(0) : absl::StatusOr<int>(status));
           });
         })
      .status();
}
inline absl::Status Rewind(FakeCluster& cluster, const std::string& session, uint64_t position) {
  return Rewind(cluster, cluster.router(), session, position);
}

// The workers come back, with what they were told to come back with.
inline void Reconnect(FakeCluster& cluster) {
  cluster.pipeline().BreakEpoch();
  ASSERT_TRUE(cluster.WaitServing());
}

// Tuned states, and a pipeline that has them.
inline constexpr char kPoet[] = "poet@12345678";
inline constexpr char kJudge[] = "judge@9abcdef0";

inline worker::FakePipeline::Options Tuned() {
  worker::FakePipeline::Options options;
  options.initial_states = {kJudge, kPoet};
  return options;
}

// Ids of a World model, so that there is text.
inline worker::FakePipeline::Options WorldPipeline() {
  worker::FakePipeline::Options options;
  options.vocab_size = 65536;
  return options;
}

}  // namespace rwkv::router
