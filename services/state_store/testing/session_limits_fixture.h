// A store with limits on its sessions, in memory, for tests.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"
#include "rocksdb/env.h"
#include "services/state_store/session_limits.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {

using WhenFull = SessionLimits::WhenFull;

inline constexpr int64_t kSnapshotBytes = 2 * 6000;  // Of TestStore::AddSnapshot.

class SessionLimitsTest : public ::testing::Test {
 protected:
  SessionLimitsTest() : env_(rocksdb::NewMemEnv(rocksdb::Env::Default())) {}

  void Open(const SessionLimits::Options& limits) {
    TestStore::Options options;
    options.data_dir = "/session_limits_test";
    options.env = env_.get();
    options.limits = limits;
    test_.reset();
    test_ = std::make_unique<TestStore>(options);
  }
  StateStore& store() { return test_->store(); }
  void Advance(absl::Duration duration) { test_->clock().Advance(duration); }

  std::vector<std::string> Sessions() {
    const absl::StatusOr<SessionPage> page = test_->catalog().ListSessions(1000, "");
    EXPECT_OK(page);
    std::vector<std::string> ids;
    for (const v1::Session& session : page->sessions) ids.push_back(session.id());
    return ids;
  }
  // A session with a turn of four tokens and a snapshot, whose lease was given back; then a minute passes.
  void MakeSession(const std::string& id) {
    ASSERT_OK_AND_ASSIGN(const v1::Lease lease, test_->Create(id));
    ASSERT_OK(test_->AddTurn(lease, "r", {1, 2, 3}, {4}));
    ASSERT_OK(test_->AddSnapshot(lease, absl::StrCat("x-", id), 4));
    ASSERT_OK(test_->catalog().ReleaseLease(lease));
    Advance(absl::Minutes(1));
  }
  absl::Status Begin(const v1::Lease& lease, const std::string& request_id) {
    NewTurn turn;
    turn.request_id = request_id;
    turn.model_fingerprint = kTestModel;
    const std::vector<uint32_t> token_ids = {7};
    turn.token_ids = token_ids;
    return store().BeginTurn(lease, turn).status();
  }
  double Ended(const std::string& reason) {
    return test_->metrics().Counter("rwkv_state_store_sessions_ended_total", "", {{"reason", reason}}).Value();
  }
  double Refused(const std::string& bound) {
    return test_->metrics().Counter("rwkv_state_store_full_refusals_total", "", {{"bound", bound}}).Value();
  }
  double StoredBytes() { return test_->metrics().Gauge("rwkv_state_store_stored_bytes", "").Value(); }

  const std::unique_ptr<rocksdb::Env> env_;
  std::unique_ptr<TestStore> test_;
};

inline SessionLimits::Options Ttl(absl::Duration ttl) {
  SessionLimits::Options options;
  options.idle_ttl = ttl;
  return options;
}
inline SessionLimits::Options MaxSessions(int64_t sessions, WhenFull when_full) {
  SessionLimits::Options options;
  options.max_sessions = sessions;
  options.when_full = when_full;
  return options;
}
inline SessionLimits::Options MaxBytes(int64_t bytes, WhenFull when_full) {
  SessionLimits::Options options;
  options.max_stored_bytes = bytes;
  options.when_full = when_full;
  return options;
}

}  // namespace rwkv::state_store
