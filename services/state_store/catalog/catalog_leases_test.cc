// Catalog: leases and fencing.
#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rocksdb/env.h"
#include "services/common/grpc_status.h"
#include "services/state_store/catalog/catalog_fixture.h"
#include "services/state_store/testing/background.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::AllOf;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::StatusIs;

TEST_P(CatalogTest, LeaseOfAnotherHolderIsWaitedFor) {
  ASSERT_OK(catalog().CreateSession("s", ""));
  ASSERT_OK_AND_ASSIGN(const LeaseGrant first, catalog().AcquireLease("s", "router-0", "1", absl::Seconds(10)));
  store_.clock().Advance(absl::Seconds(4));
  const auto refused = catalog().AcquireLease("s", "router-1", "1", absl::Seconds(10));
  EXPECT_THAT(refused, StatusIs(StatusCode::kAborted, HasSubstr("held by router-0")));
  EXPECT_EQ(common::GetRetryDelay(refused.status()), absl::Seconds(6));
  store_.clock().Advance(absl::Seconds(6));
  ASSERT_OK_AND_ASSIGN(const LeaseGrant second, catalog().AcquireLease("s", "router-1", "1", absl::Seconds(10)));
  EXPECT_GT(second.lease.fencing_token(), first.lease.fencing_token());
}

TEST_P(CatalogTest, NewIncarnationTakesOverAtOnceAndFencesTheOld) {
  ASSERT_OK(catalog().CreateSession("s", ""));
  ASSERT_OK_AND_ASSIGN(const LeaseGrant old, catalog().AcquireLease("s", "router-0", "1", absl::Minutes(1)));
  ASSERT_OK(catalog().BeginTurn(old.lease, Turn("r", Range(0, 2))));
  ASSERT_OK_AND_ASSIGN(const LeaseGrant now, catalog().AcquireLease("s", "router-0", "2", absl::Minutes(1)));
  ASSERT_GT(now.lease.fencing_token(), old.lease.fencing_token());
  EXPECT_EQ(now.session.open_request_id(), "r");

  const auto is_fenced = StatusIs(StatusCode::kAborted, AllOf(HasSubstr(absl::StrCat(old.lease.fencing_token())),
                                                              HasSubstr(absl::StrCat(now.lease.fencing_token()))));
  std::vector<std::string> freed;
  EXPECT_THAT(AppendOne(catalog(), TestAppend(old.lease, "r", 2, {3})), is_fenced);
  EXPECT_THAT(catalog().BeginTurn(old.lease, Turn("q", {})), is_fenced);
  EXPECT_THAT(catalog().RewindSession(old.lease, 1, "", &freed), is_fenced);
  EXPECT_THAT(catalog().DeleteSession(old.lease, &freed), is_fenced);
  EXPECT_THAT(catalog().ReleaseLease(old.lease), is_fenced);
  EXPECT_THAT(store_.AddSnapshot(old.lease, "x", 1), is_fenced);
  ASSERT_OK_AND_ASSIGN(const std::vector<v1::Lease> lost,
                       catalog().RenewLeases({old.lease, now.lease}, absl::Minutes(1)));
  ASSERT_EQ(lost.size(), 1u);
  EXPECT_EQ(lost[0].fencing_token(), old.lease.fencing_token());
  EXPECT_THAT(AppendOne(catalog(), TestAppend(now.lease, "r", 2, {3})), IsOk());
}

TEST_P(CatalogTest, AcquiringAgainGivesTheSameTokenWhileTheLeaseLives) {
  ASSERT_OK(catalog().CreateSession("s", ""));
  ASSERT_OK_AND_ASSIGN(const LeaseGrant first, catalog().AcquireLease("s", "router-0", "1", absl::Seconds(10)));
  store_.clock().Advance(absl::Seconds(9));
  ASSERT_OK_AND_ASSIGN(const LeaseGrant again, catalog().AcquireLease("s", "router-0", "1", absl::Seconds(10)));
  EXPECT_EQ(again.lease.fencing_token(), first.lease.fencing_token());
  store_.clock().Advance(absl::Seconds(9));  // It was extended.
  EXPECT_THAT(catalog().AcquireLease("s", "router-1", "1", absl::Seconds(10)), StatusIs(StatusCode::kAborted));
  store_.clock().Advance(absl::Seconds(1));  // It expired.
  ASSERT_OK_AND_ASSIGN(const LeaseGrant later, catalog().AcquireLease("s", "router-0", "1", absl::Seconds(10)));
  EXPECT_GT(later.lease.fencing_token(), first.lease.fencing_token());
}

TEST_P(CatalogTest, RenewalKeepsALeaseEvenWhenLateAsLongAsNobodyTookIt) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  store_.clock().Advance(absl::Hours(1));
  EXPECT_THAT(catalog().RenewLeases({lease}, absl::Seconds(10)), IsOkAndHolds(IsEmpty()));
  EXPECT_THAT(catalog().AcquireLease("s", "router-1", "1", absl::Seconds(10)), StatusIs(StatusCode::kAborted));
  ASSERT_OK(catalog().BeginTurn(lease, Turn("r", Range(0, 1))));
}

TEST_P(CatalogTest, ReleasedLeaseWritesNothingAndIsFreeForOthers) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  EXPECT_EQ(catalog().counts().leases, 1);
  ASSERT_OK(catalog().ReleaseLease(lease));
  ASSERT_OK(catalog().ReleaseLease(lease));
  EXPECT_EQ(catalog().counts().leases, 0);
  EXPECT_THAT(catalog().BeginTurn(lease, Turn("r", {})), StatusIs(StatusCode::kAborted, HasSubstr("released")));
  ASSERT_OK_AND_ASSIGN(const LeaseGrant other, catalog().AcquireLease("s", "router-1", "1", absl::Seconds(10)));
  EXPECT_GT(other.lease.fencing_token(), lease.fencing_token());
  EXPECT_THAT(catalog().ReleaseLease(lease), StatusIs(StatusCode::kAborted));
}

TEST_P(CatalogTest, LeasesOutliveARestart) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.Reopen());
  EXPECT_THAT(catalog().AcquireLease("s", "router-1", "1", absl::Seconds(10)), StatusIs(StatusCode::kAborted));
  ASSERT_OK(catalog().BeginTurn(lease, Turn("r", Range(0, 1))));
  store_.clock().Advance(absl::Minutes(1));
  ASSERT_OK_AND_ASSIGN(const LeaseGrant other, catalog().AcquireLease("s", "router-1", "1", absl::Seconds(10)));
  EXPECT_GT(other.lease.fencing_token(), lease.fencing_token());
}

TEST_P(CatalogTest, TokenOfADeletedSessionDoesNotFitItsSuccessor) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease old, store_.Create("s"));
  std::vector<std::string> freed;
  ASSERT_OK(catalog().DeleteSession(old, &freed));
  ASSERT_OK(store_.Reopen());
  ASSERT_OK_AND_ASSIGN(const v1::Lease now, store_.Create("s"));
  EXPECT_GT(now.fencing_token(), old.fencing_token());
  EXPECT_THAT(catalog().BeginTurn(old, Turn("r", {})), StatusIs(StatusCode::kAborted));
}

TEST_P(CatalogTest, TokensGrowOverARestartHoweverManyWereGiven) {
  const std::unique_ptr<rocksdb::Env> env(rocksdb::NewMemEnv(rocksdb::Env::Default()));
  TestStore::Options options;
  options.data_dir = "/tokens_test";
  options.env = env.get();
  TestStore store(options);
  ASSERT_OK_AND_ASSIGN(v1::Lease last, store.Create("s"));
  for (int restart = 0; restart < 2; ++restart) {
    for (int i = 0; i < 1030; ++i) {  // More than are reserved at a time.
      ASSERT_OK(store.catalog().ReleaseLease(last));
      ASSERT_OK_AND_ASSIGN(const v1::Lease next, store.Acquire("s"));
      ASSERT_GT(next.fencing_token(), last.fencing_token());
      last = next;
    }
    ASSERT_OK(store.Reopen());
  }
  ASSERT_OK(store.catalog().ReleaseLease(last));
  ASSERT_OK_AND_ASSIGN(const v1::Lease next, store.Acquire("s"));
  EXPECT_GT(next.fencing_token(), last.fencing_token());
}

TEST_P(CatalogTest, LeasesTokensAndFencedChangesAreCounted) {
  const auto counter = [&](const char* name) { return store_.metrics().Counter(name, "").Value(); };
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.Acquire("s").status());
  ASSERT_OK(catalog().RenewLeases({lease}, absl::Minutes(1)));
  EXPECT_EQ(catalog().counts().leases, 1);
  ASSERT_OK(store_.AddTurn(lease, "r", {1, 2, 3}, {4, 5}));
  EXPECT_EQ(counter("rwkv_state_store_appended_tokens_total"), 5);
  EXPECT_EQ(store_.metrics().Gauge("rwkv_state_store_log_tokens", "").Value(), 5);
  ASSERT_OK(catalog().ReleaseLease(lease));
  EXPECT_EQ(catalog().counts().leases, 0);
  EXPECT_EQ(counter("rwkv_state_store_fenced_total"), 0);
  v1::Lease old = lease;
  old.set_fencing_token(lease.fencing_token() + 1);
  std::vector<std::string> freed;
  EXPECT_FALSE(AppendOne(catalog(), TestAppend(old, "r", 5, {6})).ok());
  EXPECT_FALSE(catalog().BeginTurn(old, Turn("q", {})).ok());
  EXPECT_FALSE(catalog().ReleaseLease(old).ok());
  EXPECT_FALSE(catalog().RewindSession(old, 1, "", &freed).ok());
  EXPECT_FALSE(catalog().DeleteSession(old, &freed).ok());
  EXPECT_EQ(counter("rwkv_state_store_fenced_total"), 5);
}

TEST_P(CatalogTest, OfTwoRacingHoldersOneWins) {
  for (int round = 0; round < 20; ++round) {
    const std::string id = absl::StrCat("s", round);
    ASSERT_OK(catalog().CreateSession(id, ""));
    absl::StatusOr<LeaseGrant> grants[2];
    std::thread other([&] { grants[0] = catalog().AcquireLease(id, "router-0", "1", absl::Minutes(1)); });
    grants[1] = catalog().AcquireLease(id, "router-1", "1", absl::Minutes(1));
    other.join();
    ASSERT_NE(grants[0].ok(), grants[1].ok());
    EXPECT_THAT(grants[grants[0].ok() ? 1 : 0], StatusIs(StatusCode::kAborted));
  }
}

TEST_P(CatalogTest, OfTwoIncarnationsThatRaceToAppendTheFencedOneAddsNothing) {
  ASSERT_OK(catalog().CreateSession("s", ""));
  ASSERT_OK_AND_ASSIGN(const LeaseGrant old, catalog().AcquireLease("s", "router-0", "1", absl::Minutes(1)));
  ASSERT_OK(catalog().BeginTurn(old.lease, Turn("r", Range(0, 1))));
  // The old one appends until it is refused, while the new one takes over and reads the length it goes on from.
  uint64_t acknowledged = 1;
  std::atomic<bool> refused{false};
  Background background;
  background.Run([&] {
    while (!background.ending() && !refused) {
      if (AppendOne(catalog(), TestAppend(old.lease, "r", acknowledged, {1})).ok()) {
        ++acknowledged;
      } else {
        refused = true;
      }
    }
  });
  ASSERT_OK_AND_ASSIGN(const LeaseGrant now, catalog().AcquireLease("s", "router-0", "2", absl::Minutes(1)));
  ASSERT_OK(AppendOne(catalog(), TestAppend(now.lease, "r", now.session.token_count(), {2})));
  EXPECT_TRUE(Eventually([&] { return refused.load(); })) << "the old incarnation goes on";
  background.End();
  EXPECT_EQ(now.session.token_count(), acknowledged);
  ASSERT_OK_AND_ASSIGN(const std::vector<uint32_t> tokens, store_.Tokens("s"));
  EXPECT_EQ(tokens.size(), acknowledged + 1);
  EXPECT_EQ(tokens.back(), 2u);
}

INSTANTIATE_TEST_SUITE_P(Engines, CatalogTest, ::testing::Bool(), EngineName);

}  // namespace
}  // namespace rwkv::state_store
