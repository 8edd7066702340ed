#include "services/router/core/lane_keeper.h"

#include <memory>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/router/core/core_testing.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;
using ::rwkv::testing::StatusIs;
using ::testing::_;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Pair;

TurnOptions Options() {
  TurnOptions options;
  options.progress_timeout = absl::Seconds(30);
  options.attach_timeout = absl::Seconds(60);
  return options;
}

struct Lanes {
  CoreParts core{Options()};
  LaneKeeper keeper{core.context, core.turns, &core.placement, &core.saves, &core.slots, &core.ends};
};

TEST(LaneKeeperTest, ServesWhileThereIsALane) {
  Lanes lanes;
  EXPECT_FALSE(lanes.keeper.serving());
  const StagePlan plan = lanes.core.lane().plan;
  lanes.keeper.Up(8, plan);
  lanes.keeper.Up(9, plan);
  EXPECT_TRUE(lanes.keeper.serving());
  for (const uint64_t epoch : {CoreParts::kEpoch, uint64_t{8}}) lanes.keeper.Down(epoch, absl::OkStatus());
  EXPECT_TRUE(lanes.keeper.serving());
  lanes.keeper.Down(9, absl::OkStatus());
  lanes.keeper.Down(9, absl::OkStatus());
  EXPECT_FALSE(lanes.keeper.serving());
  EXPECT_THAT(lanes.core.world.told_serving, ElementsAre(true, false));
}

TEST(LaneKeeperTest, TurnsOfALostLaneWaitForAnother) {
  Lanes lanes;
  const TurnPtr running = lanes.core.Seat(""), decided = lanes.core.Seat("");
  decided->answer->Finish(v1::FINISH_REASON_LENGTH, absl::nullopt, "");
  const TurnPtr elsewhere = lanes.core.Start(Phase::kOpening, "");
  lanes.keeper.Down(CoreParts::kEpoch, absl::UnavailableError("gone"));
  EXPECT_EQ(running->phase(), Phase::kParked);
  EXPECT_EQ(running->lane, nullptr);
  EXPECT_EQ(running->lost_since, lanes.core.world.now);
  EXPECT_EQ(running->lost_at, 3);
  EXPECT_EQ(decided->phase(), Phase::kComputed);
  EXPECT_EQ(elsewhere->phase(), Phase::kOpening);
  EXPECT_THAT(lanes.core.turns.seated(), IsEmpty());
}

TEST(LaneKeeperTest, WhoLosesItsLaneAtTheSamePlaceAgainAndAgainFails) {
  Lanes lanes;
  const StagePlan plan = lanes.core.lane().plan;
  const auto stream = std::make_shared<HeldStream>();
  const TurnPtr turn = lanes.core.Start(Phase::kParked, "", "", stream);
  for (int i = 0; i < Patience::kLostEpochs; ++i) {
    EXPECT_TRUE(turn->kind->IsOpen()) << i;
    if (i > 0) lanes.keeper.Up(CoreParts::kEpoch, plan);
    turn->lane = &lanes.core.lane();
    turn->set_phase(Phase::kRunning);
    turn->planned_end = turn->attach_position + 1;
    lanes.keeper.Down(CoreParts::kEpoch, absl::UnavailableError("gone"));
  }
  EXPECT_THAT(stream->closed, ElementsAre(StatusIs(absl::StatusCode::kUnavailable, HasSubstr("lost 20 times"))));
  EXPECT_EQ(turn->phase(), Phase::kComputed);
}

TEST(LaneKeeperTest, ALaneThatIsGivenAwayEndsWhenItsTurnsHaveLeft) {
  Lanes lanes;
  const TurnPtr turn = lanes.core.Seat("");
  lanes.keeper.SweepClosing();
  EXPECT_FALSE(turn->yielding());
  lanes.keeper.Close(CoreParts::kEpoch);
  lanes.keeper.SweepClosing();
  EXPECT_TRUE(turn->yielding());
  EXPECT_THAT(lanes.core.world.ended, IsEmpty());
  lanes.core.slots.Remove(*turn);
  lanes.keeper.SweepClosing();
  EXPECT_THAT(lanes.core.world.ended, ElementsAre(Pair(CoreParts::kEpoch, _)));
}

TEST(LaneKeeperTest, ALaneWhoseStepsDoNotComeBackEnds) {
  Lanes lanes;
  const TurnPtr turn = lanes.core.Seat("");
  lanes.core.world.now += absl::Hours(1);
  lanes.keeper.Watch();  // Nothing is in flight: from now on it counts.
  lanes.core.lane().scheduler.Feed(turn->sequence, 1, Scheduler::FeedKind::kPrefill);
  lanes.core.lane().scheduler.Plan();
  lanes.core.world.now += absl::Seconds(30);
  lanes.keeper.Watch();
  EXPECT_THAT(lanes.core.world.ended, IsEmpty());
  lanes.core.world.now += absl::Milliseconds(1);
  lanes.keeper.Watch();
  lanes.keeper.Watch();
  EXPECT_THAT(lanes.core.world.ended,
              ElementsAre(Pair(CoreParts::kEpoch, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("1 are in")))));
}

TEST(LaneKeeperTest, ALaneWhoseTurnDecodesByItselfIsWatchedToo) {
  Lanes lanes;
  const TurnPtr turn = lanes.core.Seat("");
  turn->going_on.on = true;
  turn->planned_end = turn->done_end + 1;
  TurnTable::CountGoing(*turn, turn->Going());
  lanes.core.world.now += absl::Seconds(31);
  lanes.keeper.Watch();
  EXPECT_THAT(lanes.core.world.ended, ElementsAre(Pair(CoreParts::kEpoch, _)));
}

TEST(LaneKeeperTest, ASlotThatIsNotAttachedInTimeEndsItsLane) {
  Lanes lanes;
  const TurnPtr turn = lanes.core.Seat("");
  turn->set_phase(Phase::kAttaching);
  turn->attach_since = lanes.core.world.now;
  turn->prefix.attached = true;
  lanes.core.world.now += absl::Seconds(60);
  lanes.keeper.Watch();
  EXPECT_THAT(lanes.core.world.ended, IsEmpty());
  lanes.core.world.now += absl::Milliseconds(1);
  lanes.keeper.Watch();
  EXPECT_THAT(lanes.core.world.ended, ElementsAre(Pair(CoreParts::kEpoch, StatusIs(absl::StatusCode::kUnavailable))));
  EXPECT_TRUE(turn->prefix.off);
  EXPECT_TRUE(turn->kind->IsOpen());
  for (int i = 1; i < Patience::kAttachTimeouts; ++i) lanes.keeper.Watch();
  EXPECT_FALSE(turn->kind->IsOpen());
}

}  // namespace
}  // namespace rwkv::router
