// Many threads at once on sessions that share branches: each sees its own session as if it were alone, and the rows
// agree in the end.
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rocksdb/env.h"
#include "services/state_store/catalog/catalog.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::IsEmpty;

constexpr int kThreads = 6;
constexpr int kSteps = 150;
constexpr int kSnapshotsPerBranch = 2;

class Worker {
 public:
  Worker(int index, TestStore* store) : name_(absl::StrCat("router-", index)), store_(store), random_(index + 1) {}

  void Run() {
    for (int step = 0; step < kSteps && !::testing::Test::HasFailure(); ++step) Step(step);
  }

 private:
  uint64_t Below(uint64_t n) { return random_() % n; }

  // Takes a session, does one thing to it, checks it, and lets it go.
  void Step(int step) {
    const std::string id = absl::StrCat("s", Below(8));
    auto grant = store_->catalog().AcquireLease(id, name_, "1", absl::Hours(1));
    if (grant.status().code() == StatusCode::kNotFound) {
      const StatusCode code = store_->catalog().CreateSession(id, "").status().code();
      ASSERT_TRUE(code == StatusCode::kOk || code == StatusCode::kAlreadyExists) << absl::StatusCodeToString(code);
      return;
    }
    if (grant.status().code() == StatusCode::kAborted) return;  // Another thread is at it.
    ASSERT_OK(grant);
    const v1::Lease& lease = grant->lease;
    ASSERT_OK_AND_ASSIGN(std::vector<uint32_t> tokens, store_->Tokens(id));
    ASSERT_EQ(tokens.size(), grant->session.token_count());
    switch (Below(6)) {
      case 0:
      case 1: {
        const uint32_t prompt = static_cast<uint32_t>(random_()), answer = static_cast<uint32_t>(random_());
        ASSERT_OK(store_->AddTurn(lease, absl::StrCat(name_, ".", step), {prompt}, {answer}));
        tokens.push_back(prompt);
        tokens.push_back(answer);
        break;
      }
      case 2: {
        const std::string fork = absl::StrCat("s", Below(8));
        const uint64_t position = Below(tokens.size() + 1);
        const auto forked = store_->catalog().ForkSession(id, position, fork);
        if (forked.status().code() == StatusCode::kAlreadyExists) break;
        ASSERT_OK(forked);
        ASSERT_EQ(forked->token_count(), position);
        break;
      }
      case 3: {
        const uint64_t position = Below(tokens.size() + 1);
        ASSERT_OK(store_->store().RewindSession(lease, position));
        tokens.resize(position);
        break;
      }
      case 4: {
        if (tokens.empty()) break;
        const uint64_t position = 1 + Below(tokens.size());
        ASSERT_OK(store_->AddSnapshot(lease, absl::StrCat(name_, ".", step), position));
        break;
      }
      default:
        if (Below(3) != 0) break;
        ASSERT_OK(store_->store().DeleteSession(lease));
        return;
    }
    ASSERT_THAT(store_->Tokens(id), testing::IsOkAndHolds(tokens));
    // A snapshot that is found may go the next moment, when another session of the family commits more; until then its
    // records are there.
    ASSERT_OK_AND_ASSIGN(const auto manifest, store_->catalog().FindSnapshot(id, tokens.size(), kTestModel));
    if (manifest.has_value()) {
      ASSERT_LE(manifest->position(), tokens.size());
      const StatusCode code = store_->records().Get(manifest->records(0)).status().code();
      ASSERT_TRUE(code == StatusCode::kOk || code == StatusCode::kNotFound) << absl::StatusCodeToString(code);
    }
    ASSERT_OK(store_->catalog().ReleaseLease(lease));
  }

  const std::string name_;
  TestStore* const store_;
  std::mt19937 random_;
};

TEST(CatalogConcurrencyTest, SessionsThatShareBranchesDoNotDisturbEachOther) {
  const std::unique_ptr<rocksdb::Env> env(rocksdb::NewMemEnv(rocksdb::Env::Default()));
  TestStore::Options options;
  options.data_dir = "/concurrency_test";
  options.env = env.get();
  options.snapshots_per_branch = kSnapshotsPerBranch;
  TestStore store(options);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&store, i] { Worker(i, &store).Run(); });
  }
  for (std::thread& thread : threads) thread.join();
  if (HasFailure()) return;
  ASSERT_OK(CheckCatalogRows(store.rows(), kSnapshotsPerBranch));
  const CatalogCounts counts = store.catalog().counts();
  ASSERT_OK(store.Reopen());
  EXPECT_EQ(store.catalog().counts().sessions, counts.sessions);
  EXPECT_EQ(store.catalog().counts().snapshots, counts.snapshots);
  EXPECT_EQ(store.catalog().counts().leases, counts.leases);
  EXPECT_EQ(store.RecordKeys().size(), static_cast<size_t>(counts.snapshots) * 4);
  ASSERT_OK_AND_ASSIGN(const SessionPage page, store.catalog().ListSessions(1000, ""));
  for (const v1::Session& session : page.sessions) {
    ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store.Acquire(session.id()));
    ASSERT_OK(store.store().DeleteSession(lease));
  }
  EXPECT_THAT(store.CatalogKeys(), IsEmpty());
  EXPECT_THAT(store.RecordKeys(), IsEmpty());
}

}  // namespace
}  // namespace rwkv::state_store
