#include "services/state_store/session_limits.h"

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
using testing::UnorderedElementsAre;
using WhenFull = SessionLimits::WhenFull;

constexpr int64_t kSnapshotBytes = 2 * 6000;  // Of TestStore::AddSnapshot.

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

SessionLimits::Options Ttl(absl::Duration ttl) {
  SessionLimits::Options options;
  options.idle_ttl = ttl;
  return options;
}
SessionLimits::Options MaxSessions(int64_t sessions, WhenFull when_full) {
  SessionLimits::Options options;
  options.max_sessions = sessions;
  options.when_full = when_full;
  return options;
}
SessionLimits::Options MaxBytes(int64_t bytes, WhenFull when_full) {
  SessionLimits::Options options;
  options.max_stored_bytes = bytes;
  options.when_full = when_full;
  return options;
}

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

// --- The number of sessions -----------------------------------------------------------------------------------------

TEST_F(SessionLimitsTest, FullStoreRefusesNewSessionsInWords) {
  Open(MaxSessions(2, WhenFull::kRefuse));
  MakeSession("a");
  MakeSession("b");
  const auto full =
      StatusIs(StatusCode::kResourceExhausted,
               AllOf(HasSubstr("the state store is full: 2 sessions, --max_sessions=2; delete sessions, let idle ones"),
                     HasSubstr("--when_full=evict")));
  const absl::Status refused = store().CreateSession("c", "").status();
  EXPECT_THAT(refused, full);
  EXPECT_TRUE(common::GetRetryDelay(refused).has_value());
  EXPECT_EQ(common::GetErrorReason(refused), "STORE_FULL");
  EXPECT_THAT(store().ForkSession("a", absl::nullopt, "c"), full);
  EXPECT_THAT(store().ImportSession("c", {}), full);
  EXPECT_EQ(Refused("max_sessions"), 3);
  // Those that are there go on, and room is room.
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, test_->Acquire("a"));
  ASSERT_OK(test_->AddTurn(lease, "q", {1}, {2}));
  ASSERT_OK(store().DeleteSession(lease));
  EXPECT_EQ(Ended("deleted"), 1);
  ASSERT_OK(store().ForkSession("b", absl::nullopt, "c"));
  EXPECT_THAT(Sessions(), ElementsAre("b", "c"));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), ElementsAre("b", "c"));
}

TEST_F(SessionLimitsTest, SessionThatIsNotMadeTakesNoPlace) {
  Open(MaxSessions(2, WhenFull::kRefuse));
  MakeSession("a");
  for (int i = 0; i < 3; ++i) EXPECT_THAT(store().CreateSession("a", ""), StatusIs(StatusCode::kAlreadyExists));
  for (int i = 0; i < 3; ++i) EXPECT_THAT(store().ForkSession("x", 0, "c"), StatusIs(StatusCode::kNotFound));
  EXPECT_OK(store().CreateSession("b", ""));
}

TEST_F(SessionLimitsTest, RacingClientsDoNotGetPastTheBound) {
  constexpr int kThreads = 8, kEach = 5, kBound = 20;
  for (const WhenFull when_full : {WhenFull::kRefuse, WhenFull::kEvict}) {
    Open(MaxSessions(kBound, when_full));
    std::atomic<int> made{0};
    std::atomic<int64_t> most{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) {
      threads.emplace_back([&, i] {
        for (int j = 0; j < kEach; ++j) {
          made += store().CreateSession(absl::StrCat(static_cast<int>(when_full), ".", i, ".", j), "").ok();
          most = std::max<int64_t>(most, test_->catalog().counts().sessions);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_LE(most, kBound);
    EXPECT_LE(Sessions().size(), size_t{kBound});
    if (when_full == WhenFull::kEvict) {
      EXPECT_EQ(made, kThreads * kEach);
    } else {
      // One that is just being made may count twice for a moment, which refuses another too early and never too late.
      EXPECT_EQ(Sessions().size(), static_cast<size_t>(made));
      EXPECT_GE(made, kBound - kThreads);
    }
    std::vector<std::string> freed;
    for (const std::string& id : Sessions()) {
      ASSERT_OK(test_->catalog().EndIdleSession(id, test_->clock().Now(), &freed));
    }
  }
}

TEST_F(SessionLimitsTest, LongestIdleSessionsMakeRoomForNewOnes) {
  Open(MaxSessions(3, WhenFull::kEvict));
  for (const char* id : {"c", "b", "a"}) MakeSession(id);
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, test_->Acquire("c"));  // Used again, and given back.
  ASSERT_OK(test_->catalog().ReleaseLease(lease));
  Advance(absl::Seconds(1));
  ASSERT_OK(store().CreateSession("d", ""));
  EXPECT_THAT(Sessions(), ElementsAre("a", "c", "d"));
  ASSERT_OK(store().ForkSession("a", absl::nullopt, "e"));  // The oldest, and what is forked is kept.
  EXPECT_THAT(Sessions(), ElementsAre("a", "d", "e"));
  EXPECT_EQ(Ended("max_sessions"), 2);
  ASSERT_OK(CheckCatalogRows(test_->rows(), 8));
}

TEST_F(SessionLimitsTest, WithinAMinuteTheOlderGoesFirstToo) {
  Open(MaxSessions(2, WhenFull::kEvict));
  ASSERT_OK(store().CreateSession("b", ""));
  Advance(absl::Milliseconds(1));
  ASSERT_OK(store().CreateSession("a", ""));
  Advance(absl::Milliseconds(1));
  ASSERT_OK(store().CreateSession("c", ""));
  EXPECT_THAT(Sessions(), ElementsAre("a", "c"));
}

TEST_F(SessionLimitsTest, WhenAllAreInUseNewOnesAreRefusedAndNoneEnds) {
  Open(MaxSessions(2, WhenFull::kEvict));
  ASSERT_OK_AND_ASSIGN(const v1::Lease leased, test_->Create("leased"));
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, test_->Create("open"));
  ASSERT_OK(Begin(lease, "r"));
  ASSERT_OK(test_->catalog().ReleaseLease(lease));
  EXPECT_THAT(store().CreateSession("new", ""),
              StatusIs(StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("--max_sessions=2"), HasSubstr("no session is idle that could make room"))));
  EXPECT_THAT(Sessions(), ElementsAre("leased", "open"));
  // The turn is still open after an hour in which nobody held the lease: it is over, and its session idle.
  ASSERT_OK(test_->catalog().RenewLeases({leased}, absl::Hours(10)));
  Advance(absl::Hours(1) - absl::Seconds(1));
  ASSERT_OK(store().SweepSessions());
  EXPECT_FALSE(store().CreateSession("new", "").ok());
  Advance(absl::Seconds(1));
  ASSERT_OK(store().SweepSessions());
  ASSERT_OK(store().CreateSession("new", ""));
  EXPECT_THAT(Sessions(), ElementsAre("leased", "new"));
}

TEST_F(SessionLimitsTest, ManyOpenTurnsDoNotHideAnIdleSession) {
  Open(MaxSessions(101, WhenFull::kEvict));
  for (int i = 0; i < 100; ++i) {
    ASSERT_OK_AND_ASSIGN(const v1::Lease lease, test_->Create(absl::StrCat("open", i)));
    ASSERT_OK(Begin(lease, "r"));
    ASSERT_OK(test_->catalog().ReleaseLease(lease));
  }
  Advance(absl::Minutes(5));
  MakeSession("idle");
  ASSERT_OK(store().CreateSession("new", ""));
  EXPECT_THAT(Sessions(), Not(testing::Contains("idle")));
}

TEST_F(SessionLimitsTest, LoweredBoundIsReachedBySweeps) {
  Open({});
  for (int i = 0; i < 6; ++i) MakeSession(absl::StrCat("s", i));
  SessionLimits::Options limits = MaxSessions(2, WhenFull::kEvict);
  limits.ends_per_sweep = 3;
  Open(limits);
  Advance(absl::Hours(1));  // The new store's clock begins anew.
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), ElementsAre("s3", "s4", "s5"));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), ElementsAre("s4", "s5"));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), ElementsAre("s4", "s5"));
  EXPECT_EQ(Ended("max_sessions"), 4);
}

// --- The bytes ------------------------------------------------------------------------------------------------------

TEST_F(SessionLimitsTest, FullStoreRefusesNewTurnsButNotThoseThatRun) {
  Open(MaxBytes(kSnapshotBytes + 4 * 8 + 1, WhenFull::kRefuse));
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, test_->Create("s"));
  ASSERT_OK(test_->AddTurn(lease, "r", {1, 2, 3}, {4}));
  ASSERT_OK(test_->AddSnapshot(lease, "x", 4));
  ASSERT_OK(Begin(lease, "q"));  // A byte is free.
  const auto full =
      StatusIs(StatusCode::kResourceExhausted,
               AllOf(HasSubstr("12040 bytes are stored, --max_stored_bytes=12033"), HasSubstr("raise the bound")));
  EXPECT_THAT(Begin(lease, "p"), full);
  EXPECT_THAT(store().CreateSession("t", ""), full);
  EXPECT_THAT(store().ForkSession("s", absl::nullopt, "t"), full);
  EXPECT_EQ(Refused("max_stored_bytes"), 3);
  // Turns that are known: the open one, and an older one.
  EXPECT_OK(Begin(lease, "q"));
  EXPECT_OK(Begin(lease, "r"));
  ASSERT_OK(AppendOne(test_->catalog(), TestAppend(lease, "q", 5, {9}, v1::FINISH_REASON_LENGTH)));
  ASSERT_OK(test_->AddSnapshot(lease, "y", 6));
  EXPECT_THAT(test_->Tokens("s"), IsOkAndHolds(ElementsAre(1, 2, 3, 4, 7, 9)));
  // What is rewound is free again.
  ASSERT_OK(store().RewindSession(lease, 2));
  EXPECT_OK(Begin(lease, "p"));
}

TEST_F(SessionLimitsTest, LongestIdleSessionsMakeRoomForTurns) {
  Open(MaxBytes(2 * kSnapshotBytes + 6 * 8, WhenFull::kEvict));
  MakeSession("b");
  MakeSession("a");
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, test_->Acquire("b"));
  ASSERT_OK(test_->catalog().ReleaseLease(lease));  // Now "a" is the older.
  Advance(absl::Minutes(2));
  ASSERT_OK_AND_ASSIGN(const v1::Lease again, test_->Acquire("b"));
  ASSERT_OK(Begin(again, "q"));
  EXPECT_THAT(Sessions(), ElementsAre("b"));
  EXPECT_EQ(Ended("max_stored_bytes"), 1);
  // Of one session that is all there is, the turn is refused: it does not end itself, whatever its lease.
  ASSERT_OK(AppendOne(test_->catalog(), TestAppend(again, "q", 5, {9}, v1::FINISH_REASON_LENGTH)));
  ASSERT_OK(test_->AddSnapshot(again, "y", 6));
  Advance(absl::Hours(1));
  EXPECT_THAT(Begin(again, "p"), StatusIs(StatusCode::kResourceExhausted, HasSubstr("no session is idle")));
  EXPECT_THAT(Sessions(), ElementsAre("b"));
}

TEST_F(SessionLimitsTest, SweepMakesRoomForWhatRunningTurnsAdded) {
  Open(MaxBytes(2 * (kSnapshotBytes + 4 * 8), WhenFull::kEvict));
  MakeSession("b");
  MakeSession("a");
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), ElementsAre("a", "b"));  // Full to the last byte, and no more.
  EXPECT_EQ(StoredBytes(), 2 * (kSnapshotBytes + 4 * 8));
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, test_->Acquire("a"));
  ASSERT_OK(test_->AddSnapshot(lease, "y", 3));
  ASSERT_OK(store().SweepSessions());
  EXPECT_THAT(Sessions(), ElementsAre("a"));
  EXPECT_EQ(Ended("max_stored_bytes"), 1);
}

TEST_F(SessionLimitsTest, WhatIsSharedCountsOnce) {
  Open({});
  MakeSession("s");
  for (int i = 0; i < 5; ++i) ASSERT_OK(store().ForkSession("s", 4, absl::StrCat("f", i)));
  EXPECT_EQ(test_->catalog().counts().tokens, 4);
  ASSERT_OK(test_->Reopen());
  EXPECT_EQ(test_->catalog().counts().tokens, 4);
  ASSERT_OK(store().SweepSessions());
  EXPECT_EQ(StoredBytes(), kSnapshotBytes + 4 * 8);
}

}  // namespace
}  // namespace rwkv::state_store
