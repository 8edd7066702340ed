#include "services/state_store/session_limits.h"

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/grpc_status.h"
#include "services/state_store/testing/session_limits_fixture.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::IsOkAndHolds;
using testing::Not;
using testing::StatusIs;

// --- Options --------------------------------------------------------------------------------------------------------

TEST_F(SessionLimitsTest, OptionsAreChecked) {
  EXPECT_OK(SessionLimits::Check({}));
  EXPECT_OK(SessionLimits::Check(MaxBytes(1, WhenFull::kEvict)));
  EXPECT_OK(SessionLimits::Check(MaxSessions(1, WhenFull::kEvict)));
  const auto expect = [](const SessionLimits::Options& options, const char* words) {
    EXPECT_THAT(SessionLimits::Check(options), StatusIs(StatusCode::kInvalidArgument, HasSubstr(words)));
  };
  expect(Ttl(-absl::Seconds(1)), "--session_idle_ttl=-1s");
  expect(MaxBytes(-1, WhenFull::kRefuse), "--max_stored_bytes=-1");
  expect(MaxSessions(-2, WhenFull::kRefuse), "--max_sessions=-2");
  expect(MaxSessions(0, WhenFull::kEvict), "--when_full=evict without");
  SessionLimits::Options options;
  options.ends_per_sweep = 0;
  expect(options, "ends_per_sweep");
  EXPECT_THAT(SessionLimits::ParseWhenFull("refuse"), IsOkAndHolds(WhenFull::kRefuse));
  EXPECT_THAT(SessionLimits::ParseWhenFull("evict"), IsOkAndHolds(WhenFull::kEvict));
  EXPECT_THAT(SessionLimits::ParseWhenFull("drop"),
              StatusIs(StatusCode::kInvalidArgument, HasSubstr("--when_full=drop, want refuse or evict")));
}

TEST_F(SessionLimitsTest, BadOptionsEndTheStoreAtStart) {
  EmbeddedStateStore::Options options;
  options.store.limits = MaxSessions(-1, WhenFull::kRefuse);
  rwkv::testing::FakeClock clock;
  const auto metrics = *common::Metrics::Create("");
  EXPECT_THAT(EmbeddedStateStore::Create(options, &clock, metrics.get()),
              StatusIs(StatusCode::kInvalidArgument, HasSubstr("--max_sessions")));
}

// --- Idle time ------------------------------------------------------------------------------------------------------

TEST_F(SessionLimitsTest, WithoutLimitsNothingEnds) {
  Open({});
  MakeSession("s");
  Advance(absl::Hours(24 * 365));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), ElementsAre("s"));
  EXPECT_THAT(test_->catalog().GetSession("t"),
              StatusIs(StatusCode::kNotFound, AllOf(HasSubstr("session t does not exist"), Not(HasSubstr("ended")))));
}

TEST_F(SessionLimitsTest, IdleSessionEndsExactlyAfterItsTime) {
  Open(Ttl(absl::Minutes(30)));
  MakeSession("s");
  MakeSession("t");  // A minute younger.
  Advance(absl::Minutes(28) - absl::Nanoseconds(1));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), ElementsAre("s", "t"));
  Advance(absl::Nanoseconds(1));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), ElementsAre("t"));
  EXPECT_EQ(Ended("idle"), 1);
  EXPECT_EQ(StoredBytes(), kSnapshotBytes + 4 * 8);
  Advance(absl::Minutes(1));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), IsEmpty());
  EXPECT_THAT(test_->CatalogKeys(), IsEmpty());
  EXPECT_THAT(test_->RecordKeys(), IsEmpty());
  EXPECT_EQ(StoredBytes(), 0);
  EXPECT_EQ(test_->catalog().counts().tokens, 0);
  EXPECT_EQ(test_->catalog().counts().leases, 0);
}

TEST_F(SessionLimitsTest, EndedSessionIsNotFoundWithTheReason) {
  SessionLimits::Options limits = MaxSessions(5, WhenFull::kEvict);
  limits.idle_ttl = absl::Minutes(90);
  Open(limits);
  MakeSession("s");
  Advance(absl::Hours(2));
  ASSERT_OK(store().SweepSessions());
  const auto gone = StatusIs(StatusCode::kNotFound,
                             AllOf(HasSubstr("session s does not exist; it may have ended: sessions end after 1h30m "
                                             "without use"),
                                   HasSubstr("when the store is full, the longest unused first")));
  EXPECT_THAT(test_->catalog().GetSession("s"), gone);
  EXPECT_THAT(test_->Acquire("s"), gone);
  EXPECT_THAT(test_->catalog().ForkSession("s", absl::nullopt, "f"), gone);
  v1::Lease lease;
  lease.set_session_id("s");
  lease.set_fencing_token(1);
  EXPECT_THAT(Begin(lease, "q"), gone);
  EXPECT_THAT(AppendOne(test_->catalog(), TestAppend(lease, "q", 0, {1})), gone);
}

TEST_F(SessionLimitsTest, EveryUseBeginsTheIdleTimeAnew) {
  Open(Ttl(absl::Minutes(30)));
  ASSERT_OK_AND_ASSIGN(v1::Lease lease, test_->Create("s"));
  ASSERT_OK(test_->AddTurn(lease, "r", {1, 2, 3}, {4}));
  ASSERT_OK(test_->catalog().ReleaseLease(lease));
  const auto still_there_after_another_use = [&](const char* what) {
    Advance(absl::Minutes(29));
    ASSERT_OK(store().SweepSessions());
    EXPECT_THAT(Sessions(), ElementsAre("s")) << what;
  };
  still_there_after_another_use("nothing yet");
  ASSERT_OK_AND_ASSIGN(lease, test_->Acquire("s"));
  still_there_after_another_use("acquire");
  ASSERT_OK(test_->catalog().ReleaseLease(lease));
  still_there_after_another_use("release");
  ASSERT_OK_AND_ASSIGN(lease, test_->Acquire("s"));
  Advance(absl::Minutes(20));
  ASSERT_OK(test_->AddTurn(lease, "q", {5}, {6}));
  still_there_after_another_use("a turn under a lease that has run out");
  ASSERT_OK(store().RewindSession(lease, 2));
  still_there_after_another_use("rewind");
  Advance(absl::Minutes(1));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), IsEmpty());
}

TEST_F(SessionLimitsTest, SessionWithALiveLeaseStays) {
  Open(Ttl(absl::Minutes(1)));
  ASSERT_OK(store().CreateSession("s", "").status());
  ASSERT_OK_AND_ASSIGN(const LeaseGrant grant, test_->catalog().AcquireLease("s", "router-0", "1", absl::Minutes(50)));
  Advance(absl::Minutes(49));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), ElementsAre("s"));
  ASSERT_OK(test_->catalog().RenewLeases({grant.lease}, absl::Minutes(30)));
  Advance(absl::Minutes(29));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), ElementsAre("s"));
  // A lease that nobody gave back: idle from its end.
  Advance(absl::Minutes(1) + absl::Seconds(59));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), ElementsAre("s"));
  Advance(absl::Seconds(1));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), IsEmpty());
  EXPECT_EQ(test_->catalog().counts().leases, 0);
}

TEST_F(SessionLimitsTest, OpenTurnIsEndedAsCancelledBeforeItsSessionEnds) {
  Open(Ttl(absl::Minutes(30)));
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, test_->Create("s"));
  ASSERT_OK(Begin(lease, "r"));
  ASSERT_OK(AppendOne(test_->catalog(), TestAppend(lease, "r", 1, {8})));
  ASSERT_OK(test_->catalog().ReleaseLease(lease));
  Advance(absl::Minutes(29));
  ASSERT_OK(store().SweepSessions());
  ASSERT_OK_AND_ASSIGN(absl::optional<v1::Turn> turn, test_->catalog().FindTurn("s", "r"));
  EXPECT_EQ(turn->state(), v1::TURN_STATE_OPEN);
  Advance(absl::Minutes(1));
  ASSERT_OK(store().SweepSessions());
  ASSERT_OK_AND_ASSIGN(turn, test_->catalog().FindTurn("s", "r"));
  EXPECT_EQ(turn->state(), v1::TURN_STATE_FINISHED);
  EXPECT_EQ(turn->finish_reason(), v1::FINISH_REASON_CANCELLED);
  EXPECT_EQ(turn->token_count(), 1u);
  ASSERT_OK_AND_ASSIGN(const v1::Session session, test_->catalog().GetSession("s"));
  EXPECT_EQ(session.open_request_id(), "");
  EXPECT_EQ(Ended("idle"), 0);
  Advance(absl::Minutes(29));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), ElementsAre("s"));
  Advance(absl::Minutes(1));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), IsEmpty());
}

TEST_F(SessionLimitsTest, WhatForksShareSurvivesAsLongAsOneOfThemDoes) {
  Open(Ttl(absl::Minutes(30)));
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, test_->Create("parent"));
  ASSERT_OK(test_->AddTurn(lease, "r", {1, 2, 3}, {4, 5, 6}));
  ASSERT_OK(test_->AddSnapshot(lease, "at3", 3));
  ASSERT_OK(test_->AddSnapshot(lease, "at6", 6));
  ASSERT_OK(test_->catalog().ReleaseLease(lease));
  Advance(absl::Minutes(20));
  ASSERT_OK(store().ForkSession("parent", 4, "child").status());
  Advance(absl::Minutes(20));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), ElementsAre("child"));
  EXPECT_THAT(test_->Tokens("child"), IsOkAndHolds(ElementsAre(1, 2, 3, 4)));
  ASSERT_OK_AND_ASSIGN(const auto snapshot, test_->catalog().FindSnapshot("child", 4, kTestModel));
  ASSERT_TRUE(snapshot.has_value());
  EXPECT_EQ(snapshot->snapshot_id(), "at3");
  for (const v1::RecordInfo& info : snapshot->records()) EXPECT_OK(test_->records().Get(info));
  EXPECT_THAT(test_->catalog().HasSnapshot("at6"), IsOkAndHolds(false));
  EXPECT_EQ(test_->records().bytes(), kSnapshotBytes);
  EXPECT_EQ(test_->catalog().counts().tokens, 4);
  ASSERT_OK(CheckCatalogRows(test_->rows(), 8));
  Advance(absl::Minutes(20));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(test_->CatalogKeys(), IsEmpty());
  EXPECT_THAT(test_->RecordKeys(), IsEmpty());
}

TEST_F(SessionLimitsTest, OneSweepEndsABoundedNumberAndTheOldestFirst) {
  SessionLimits::Options limits = Ttl(absl::Minutes(30));
  limits.ends_per_sweep = 2;
  Open(limits);
  for (const char* id : {"e", "d", "c", "b", "a"}) MakeSession(id);
  Advance(absl::Hours(1));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), ElementsAre("a", "b", "c"));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), ElementsAre("a"));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), IsEmpty());
  EXPECT_EQ(Ended("idle"), 5);
}

TEST_F(SessionLimitsTest, IdleTimesOutliveARestart) {
  Open(Ttl(absl::Minutes(30)));
  MakeSession("s");
  Advance(absl::Minutes(20));
  MakeSession("t");
  ASSERT_OK(test_->Reopen());
  Advance(absl::Minutes(15));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), ElementsAre("t"));
}

TEST_F(SessionLimitsTest, SessionsOfAnOlderBuildFindTheirPlaceAtStart) {
  Open(Ttl(absl::Minutes(30)));
  for (const char* id : {"s", "t"}) MakeSession(id);
  ASSERT_OK(RemoveIdleRows(test_->rows()));
  ASSERT_OK(test_->Reopen());
  ASSERT_OK(CheckCatalogRows(test_->rows(), 8));
  Advance(absl::Minutes(28));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), ElementsAre("t"));
}

TEST_F(SessionLimitsTest, SessionThatComesBackWhileItIsAboutToEndStays) {
  Open({});
  MakeSession("s");
  ASSERT_OK_AND_ASSIGN(const std::vector<IdleSession> oldest,
                       test_->catalog().OldestSessions(test_->clock().Now(), 10));
  ASSERT_EQ(oldest.size(), 1u);
  std::vector<std::string> freed;
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, test_->Acquire("s"));
  EXPECT_THAT(test_->catalog().EndIdleSession("s", oldest[0].idle_since, &freed), IsOkAndHolds(false));
  EXPECT_THAT(test_->catalog().EndIdleSession("s", test_->clock().Now(), &freed), IsOkAndHolds(false));
  ASSERT_OK(Begin(lease, "q"));
  ASSERT_OK(test_->catalog().ReleaseLease(lease));
  EXPECT_THAT(test_->catalog().EndIdleSession("s", test_->clock().Now(), &freed), IsOkAndHolds(false));
  EXPECT_THAT(test_->catalog().EndIdleSession("other", test_->clock().Now(), &freed), IsOkAndHolds(false));
  EXPECT_THAT(test_->catalog().EndIdleTurn("s", oldest[0].idle_since), IsOkAndHolds(false));
  EXPECT_THAT(test_->catalog().EndIdleTurn("other", test_->clock().Now()), IsOkAndHolds(false));
  EXPECT_THAT(test_->catalog().EndIdleTurn("s", test_->clock().Now()), IsOkAndHolds(true));
  EXPECT_THAT(test_->catalog().EndIdleTurn("s", test_->clock().Now()), IsOkAndHolds(false));
  EXPECT_THAT(freed, IsEmpty());
  EXPECT_THAT(test_->catalog().EndIdleSession("s", test_->clock().Now(), &freed), IsOkAndHolds(true));
  EXPECT_THAT(freed, ElementsAre("x-s"));
}

}  // namespace
}  // namespace rwkv::state_store
