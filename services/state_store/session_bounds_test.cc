// The bounds on how many sessions there are and how much they store.
#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/grpc_status.h"
#include "services/state_store/session_limits.h"
#include "services/state_store/testing/session_limits_fixture.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsOkAndHolds;
using testing::Not;
using testing::StatusIs;

using SessionBoundsTest = SessionLimitsTest;

// --- The number of sessions -----------------------------------------------------------------------------------------

TEST_F(SessionBoundsTest, FullStoreRefusesNewSessionsInWords) {
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

TEST_F(SessionBoundsTest, SessionThatIsNotMadeTakesNoPlace) {
  Open(MaxSessions(2, WhenFull::kRefuse));
  MakeSession("a");
  for (int i = 0; i < 3; ++i) EXPECT_THAT(store().CreateSession("a", ""), StatusIs(StatusCode::kAlreadyExists));
  for (int i = 0; i < 3; ++i) EXPECT_THAT(store().ForkSession("x", 0, "c"), StatusIs(StatusCode::kNotFound));
  EXPECT_OK(store().CreateSession("b", ""));
}

TEST_F(SessionBoundsTest, RacingClientsDoNotGetPastTheBound) {
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

TEST_F(SessionBoundsTest, LongestIdleSessionsMakeRoomForNewOnes) {
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

TEST_F(SessionBoundsTest, WithinAMinuteTheOlderGoesFirstToo) {
  Open(MaxSessions(2, WhenFull::kEvict));
  ASSERT_OK(store().CreateSession("b", ""));
  Advance(absl::Milliseconds(1));
  ASSERT_OK(store().CreateSession("a", ""));
  Advance(absl::Milliseconds(1));
  ASSERT_OK(store().CreateSession("c", ""));
  EXPECT_THAT(Sessions(), ElementsAre("a", "c"));
}

TEST_F(SessionBoundsTest, WhenAllAreInUseNewOnesAreRefusedAndNoneEnds) {
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

TEST_F(SessionBoundsTest, ManyOpenTurnsDoNotHideAnIdleSession) {
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

TEST_F(SessionBoundsTest, LoweredBoundIsReachedBySweeps) {
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

TEST_F(SessionBoundsTest, FullStoreRefusesNewTurnsButNotThoseThatRun) {
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

TEST_F(SessionBoundsTest, LongestIdleSessionsMakeRoomForTurns) {
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

TEST_F(SessionBoundsTest, SweepMakesRoomForWhatRunningTurnsAdded) {
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

TEST_F(SessionBoundsTest, WhatIsSharedCountsOnce) {
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
