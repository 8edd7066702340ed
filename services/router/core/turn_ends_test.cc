#include "services/router/core/turn_ends.h"

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/router/core/core_testing.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;

TEST(TurnEndsTest, ACallInTheLineLeavesItAndItsSession) {
  CoreParts core({});
  const TurnPtr call = core.MakeTurn("", "s");
  core.line.Add(call);
  core.sessions.Of("s").next = call;
  core.ends.Abandon(*call);
  EXPECT_TRUE(call->stopped);
  EXPECT_EQ(call->phase(), Phase::kComputed);
  EXPECT_TRUE(core.line.empty());
  EXPECT_EQ(core.sessions.Of("s").next, nullptr);
}

TEST(TurnEndsTest, AnotherThatWaitsForTheSessionStays) {
  CoreParts core({});
  const TurnPtr call = core.MakeTurn("", "s"), other = core.MakeTurn("", "s");
  core.sessions.Of("s").next = other;
  core.ends.Abandon(*call);
  EXPECT_EQ(core.sessions.Of("s").next, other);
}

TEST(TurnEndsTest, ATurnThatYieldedLeavesTheLineAndRunsNoMore) {
  CoreParts core({});
  const TurnPtr turn = core.Start(Phase::kYielded, "");
  core.line.Add(turn);
  EXPECT_EQ(core.line.running(), 0);
  core.ends.Abandon(*turn);
  EXPECT_EQ(turn->phase(), Phase::kComputed);
  EXPECT_TRUE(core.line.empty());
  EXPECT_EQ(core.line.running(), 1);  // Until a sweep forgets it.
}

TEST(TurnEndsTest, WhoIsAtTheStoreSeesItWhenItComesBack) {
  for (const Phase phase : {Phase::kOpening, Phase::kLocating}) {
    CoreParts core({});
    const TurnPtr turn = core.Start(phase, "", "s");
    core.ends.Abandon(*turn);
    EXPECT_TRUE(turn->stopped);
    EXPECT_EQ(turn->phase(), phase);
  }
}

TEST(TurnEndsTest, WithoutALogTheSlotIsFree) {
  CoreParts core({});
  const TurnPtr turn = core.Seat("");
  core.ends.Abandon(*turn);
  EXPECT_EQ(turn->phase(), Phase::kComputed);
  EXPECT_EQ(turn->lane, nullptr);
  EXPECT_EQ(core.lane().scheduler.sequences(), 0);
  EXPECT_EQ(core.lane().scheduler.slots_warm(), 0);
  EXPECT_TRUE(core.turns.seated().empty());
}

TEST(TurnEndsTest, WithALogTheSlotStaysWarm) {
  CoreParts core({});
  const TurnPtr turn = core.Seat("", "s");
  turn->saved_position = 1;
  core.ends.Abandon(*turn);
  EXPECT_EQ(turn->phase(), Phase::kComputed);
  EXPECT_EQ(core.lane().scheduler.slots_warm(), 1);
  EXPECT_EQ(core.sessions.Of("s").saves, 1);
}

TEST(TurnEndsTest, WhatIsNotInTheLogIsInNoWarmSlotEither) {
  CoreParts core({});
  const TurnPtr turn = core.Seat("", "s");
  turn->abandoned = true;
  core.ends.Abandon(*turn);
  EXPECT_EQ(core.lane().scheduler.slots_warm(), 0);
  EXPECT_EQ(core.sessions.Of("s").saves, 0);
}

TEST(TurnEndsTest, OneThatDecodesByItselfIsToldToStopFirst) {
  CoreParts core({});
  const TurnPtr turn = core.Seat("", "s");
  turn->going_on.on = true;
  turn->planned_end = turn->done_end + 4;
  core.ends.Abandon(*turn);
  EXPECT_TRUE(turn->going_on.halting);
  EXPECT_EQ(turn->phase(), Phase::kRunning);
  EXPECT_EQ(core.lane().scheduler.sequences(), 1);
}

TEST(TurnEndsTest, AFailureIsToldOnce) {
  CoreParts core({});
  const auto stream = std::make_shared<HeldStream>();
  const TurnPtr turn = core.Start(Phase::kParked, "", "s", stream);
  core.ends.Fail(*turn, absl::UnavailableError("no lane"));
  core.ends.Fail(*turn, absl::InternalError("again"));
  EXPECT_THAT(stream->closed, ElementsAre(StatusIs(absl::StatusCode::kUnavailable)));
  EXPECT_TRUE(turn->stopped);
  EXPECT_FALSE(turn->decided());  // The log keeps it open.
  EXPECT_EQ(core.turns.FindCall(turn->call), nullptr);
}

TEST(TurnEndsTest, ARefusalIsTheEndInTheLogToo) {
  CoreParts core({});
  const TurnPtr turn = core.Start(Phase::kParked, "", "s");
  core.ends.Refuse(*turn, absl::InvalidArgumentError("never"));
  EXPECT_TRUE(turn->kind->IsOpen());  // Told when it is durable.
  EXPECT_EQ(turn->answer->reason(), v1::FINISH_REASON_ERROR);
  EXPECT_THAT(turn->error, StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_FALSE(turn->IsCommitted());

  const TurnPtr without_log = core.Start(Phase::kParked, "");
  core.ends.Refuse(*without_log, absl::InvalidArgumentError("never"));
  EXPECT_FALSE(without_log->kind->IsOpen());
  EXPECT_TRUE(without_log->stopped);
}

}  // namespace
}  // namespace rwkv::router
