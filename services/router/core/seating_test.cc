#include "services/router/core/seating.h"

#include <memory>

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
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

struct Seats {
  static TurnOptions Options() {
    TurnOptions options;
    options.outage_timeout = absl::Seconds(60);
    return options;
  }
  TurnPtr Park(const std::string& session = "") {
    const TurnPtr turn = core.Start(Phase::kParked, "", session, stream);
    turn->parked_since = core.world.now;
    return turn;
  }

  CoreParts core{Options()};
  std::shared_ptr<HeldStream> stream = std::make_shared<HeldStream>();
  Attaching attaching{core.context, core.placement, &core.turns, &core.prefixes, &core.slots, &core.ends};
  Seating seating{core.context, core.placement, attaching, &core.prefixes, &core.streams, &core.slots, &core.ends};
};

TEST(SeatingTest, WhoHasNothingToGoOnFromIsAttachedAtOnce) {
  Seats seats;
  const TurnPtr turn = seats.Park();
  seats.seating.Advance(turn);
  EXPECT_EQ(turn->phase(), Phase::kAttaching);
  EXPECT_EQ(turn->fed_end, 3);
  EXPECT_THAT(seats.core.world.jobs, IsEmpty());
}

TEST(SeatingTest, WhoHasASessionAsksTheStoreForItsSnapshot) {
  Seats seats;
  const TurnPtr turn = seats.Park("s");
  seats.seating.Advance(turn);
  EXPECT_EQ(turn->phase(), Phase::kLocating);
  EXPECT_THAT(seats.core.world.jobs, SizeIs(1));
}

TEST(SeatingTest, AWarmSlotIsTakenBeforeTheStoreIsAsked) {
  Seats seats;
  const TurnPtr before = seats.core.Seat("", "s");
  before->session->log_branch = "b";
  seats.core.slots.Retire(*before);
  const TurnPtr turn = seats.Park("s");
  turn->begin = 3;
  seats.seating.Advance(turn);
  EXPECT_EQ(turn->phase(), Phase::kAttaching);
  EXPECT_TRUE(turn->warm_source.has_value());
  EXPECT_EQ(turn->attach_position, 3);
  EXPECT_EQ(turn->fed_end, 6);
  EXPECT_THAT(seats.core.world.jobs, IsEmpty());
}

TEST(SeatingTest, OneThatTurnedOutNotToBeIsNot) {
  Seats seats;
  const TurnPtr before = seats.core.Seat("", "s");
  seats.core.slots.Retire(*before);
  const TurnPtr turn = seats.Park("s");
  turn->begin = 3;
  turn->no_warm = true;
  seats.seating.Advance(turn);
  EXPECT_EQ(turn->phase(), Phase::kLocating);
}

TEST(SeatingTest, WhatTheLogHasBehindAWarmSlotIsReadMeanwhile) {
  Seats seats;
  seats.core.slots.Retire(*seats.core.Seat("", "s"));
  const TurnPtr turn = seats.Park("s");
  turn->begin = 5;
  seats.seating.Advance(turn);
  EXPECT_TRUE(turn->tail_pending);
  EXPECT_EQ(turn->fed_end, 3);
  EXPECT_THAT(seats.core.world.jobs, SizeIs(1));
}

TEST(SeatingTest, WhoIsToWaitWaits) {
  Seats seats;
  const TurnPtr turn = seats.Park();
  turn->not_before = seats.core.world.now + absl::Milliseconds(1);
  seats.seating.Advance(turn);
  EXPECT_EQ(turn->phase(), Phase::kParked);
  EXPECT_EQ(seats.seating.LookAgain(*turn), turn->not_before);
  seats.core.world.now = turn->not_before;
  seats.seating.Advance(turn);
  EXPECT_EQ(turn->phase(), Phase::kAttaching);
  EXPECT_EQ(seats.seating.LookAgain(*turn), absl::InfiniteFuture());
}

TEST(SeatingTest, WhoYieldedWaitsForItsStateAWhile) {
  Seats seats;
  const TurnPtr turn = seats.Park();
  turn->yielded = true;
  turn->saves = 1;
  seats.seating.Advance(turn);
  EXPECT_EQ(turn->phase(), Phase::kParked);
  EXPECT_EQ(seats.seating.LookAgain(*turn), turn->parked_since + kSaveWait);
  seats.core.world.now += kSaveWait;
  seats.seating.Advance(turn);
  EXPECT_EQ(turn->phase(), Phase::kAttaching);
}

TEST(SeatingTest, WithoutALaneItWaitsForOneAndNotForEver) {
  Seats seats;
  seats.core.placement.Close(seats.core.lane());
  const TurnPtr turn = seats.Park();
  seats.core.world.now += absl::Seconds(60);
  seats.seating.Advance(turn);
  EXPECT_THAT(seats.stream->closed, IsEmpty());
  EXPECT_EQ(seats.seating.LookAgain(*turn), seats.core.world.now);
  seats.core.world.now += absl::Milliseconds(1);
  seats.seating.Advance(turn);
  EXPECT_THAT(seats.stream->closed, ElementsAre(StatusIs(absl::StatusCode::kUnavailable, HasSubstr("for 1m"))));
  EXPECT_EQ(turn->phase(), Phase::kComputed);
}

TEST(SeatingTest, WhoLostItsLaneAndFindsNoPlaceGoesIntoTheLine) {
  Seats seats;
  seats.core.Seat("");
  seats.core.Seat("");
  const TurnPtr turn = seats.Park();
  turn->lost_since = seats.core.world.now;
  seats.seating.Advance(turn);
  EXPECT_EQ(turn->phase(), Phase::kYielded);
  EXPECT_THAT(seats.core.line.turns(), ElementsAre(turn));
}

TEST(SeatingTest, WhoseModelIsGoneIsToldSo) {
  Seats seats;
  const TurnPtr turn = seats.Park();
  turn->set_pool("g/x");
  seats.seating.Advance(turn);
  EXPECT_THAT(seats.stream->closed, ElementsAre(StatusIs(absl::StatusCode::kUnavailable, HasSubstr("numeric family"))));
}

}  // namespace
}  // namespace rwkv::router
