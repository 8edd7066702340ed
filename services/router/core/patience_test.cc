#include "services/router/core/patience.h"

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"

namespace rwkv::router {
namespace {

using Verdict = Patience::Verdict;
using absl::StatusCode;

TEST(PatienceTest, WhatIsRefusedTwiceAtThePlaceIsRefused) {
  Patience patience;
  patience.Came(10);
  EXPECT_EQ(patience.EntryFailed(StatusCode::kInternal), Verdict::kTryAgain);
  patience.Came(4);  // It is fed again from the start.
  patience.Came(10);
  EXPECT_EQ(patience.EntryFailed(StatusCode::kInternal), Verdict::kRefused);
  EXPECT_EQ(patience.furthest(), 10);
}

TEST(PatienceTest, AStepFurtherBeginsTheCountAgain) {
  Patience patience;
  for (uint64_t position = 1; position < 100; ++position) {
    EXPECT_EQ(patience.EntryFailed(StatusCode::kInternal), Verdict::kTryAgain);
    patience.Came(position);
    EXPECT_EQ(patience.failures(), 0);
  }
}

TEST(PatienceTest, ChangingRefusalsEndToo) {
  Patience patience;
  for (int i = 1; i < Patience::kAttempts; ++i) {
    EXPECT_EQ(patience.EntryFailed(i % 2 == 0 ? StatusCode::kInternal : StatusCode::kFailedPrecondition),
              Verdict::kTryAgain)
        << i;
  }
  EXPECT_EQ(patience.EntryFailed(StatusCode::kUnknown), Verdict::kGiveUp);
}

TEST(PatienceTest, AnotherPositionIsNobodysFault) {
  Patience patience;
  for (int i = 1; i < Patience::kAttempts; ++i) {
    EXPECT_EQ(patience.EntryFailed(StatusCode::kAborted), Verdict::kTryAgain) << i;
    EXPECT_EQ(patience.LeavesSnapshots(absl::UnixEpoch()), i >= Patience::kAttemptsWithSnapshot) << i;
  }
  EXPECT_EQ(patience.EntryFailed(StatusCode::kAborted), Verdict::kGiveUp);
}

TEST(PatienceTest, ASnapshotThatHangsIsLeftAloneInTime) {
  const absl::Time begin = absl::FromUnixSeconds(1000);
  const absl::Time end = begin + Patience::kTimeWithSnapshot;
  Patience patience;
  patience.AttachBegan(begin);
  EXPECT_FALSE(patience.LeavesSnapshots(end));  // It has not failed.
  patience.AttachFailed();
  EXPECT_FALSE(patience.LeavesSnapshots(end - absl::Milliseconds(1)));
  patience.AttachBegan(end);
  EXPECT_TRUE(patience.LeavesSnapshots(end));
  // Once it has a slot the time begins again.
  patience.Attached();
  EXPECT_FALSE(patience.LeavesSnapshots(end));
  patience.AttachBegan(end);
  patience.AttachFailed();
  EXPECT_FALSE(patience.LeavesSnapshots(end));
}

TEST(PatienceTest, ReplayingSetsNoCountBack) {
  Patience patience;
  patience.Came(100);
  for (int i = 1; i < Patience::kAttempts; ++i) {
    EXPECT_EQ(patience.AttachFailed(), Verdict::kTryAgain) << i;
    patience.Came(i);
    patience.Came(100);
  }
  EXPECT_EQ(patience.AttachFailed(), Verdict::kGiveUp);
}

TEST(PatienceTest, AttachesThatAreNeverAnsweredEnd) {
  Patience patience;
  for (int i = 1; i < Patience::kAttachTimeouts; ++i) EXPECT_EQ(patience.AttachTimedOut(), Verdict::kTryAgain) << i;
  EXPECT_EQ(patience.AttachTimedOut(), Verdict::kGiveUp);
}

TEST(PatienceTest, LostEpochsWithoutProgressEnd) {
  Patience patience;
  for (int i = 1; i < Patience::kLostEpochs; ++i) EXPECT_EQ(patience.EpochLost(), Verdict::kTryAgain) << i;
  patience.Came(1);
  for (int i = 1; i < Patience::kLostEpochs; ++i) EXPECT_EQ(patience.EpochLost(), Verdict::kTryAgain) << i;
  EXPECT_EQ(patience.EpochLost(), Verdict::kGiveUp);
}

}  // namespace
}  // namespace rwkv::router
