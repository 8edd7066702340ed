#include "services/router/core/lane_commands.h"

#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/router/core/core_testing.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

struct Sends {
  // What is sent to the lane now.
  std::vector<v1::ExecuteRequest> Send() {
    core.world.commands.clear();
    commands.Send(core.lane());
    std::vector<v1::ExecuteRequest> sent;
    for (const ScriptedWorld::Command& command : core.world.commands) {
      EXPECT_EQ(command.epoch, CoreParts::kEpoch);
      sent.push_back(*command.request);
    }
    return sent;
  }
  // One that has been admitted, from `position`, with its input of three tokens behind `begin`.
  TurnPtr Admit(uint64_t begin, uint64_t position) {
    const TurnPtr turn = core.Start(Phase::kAttaching, "", "s");
    turn->begin = begin;
    turn->attach_position = turn->planned_end = turn->done_end = position;
    turn->tail.assign(begin - position, 9);
    core.turns.Seat(turn);
    turn->lane = &core.lane();
    core.lane().scheduler.Admit(turn->sequence, position);
    return turn;
  }

  CoreParts core{{}};
  GoingOn going_on{core.context, &core.saves};
  LaneCommands commands{core.context, core.turns, core.saves, going_on};
};

TEST(LaneCommandsTest, ASlotBeginsFromNothingFromASnapshotOrWarm) {
  Sends sends;
  const TurnPtr fresh = sends.Admit(0, 0), saved = sends.Admit(20, 10);
  fresh->initial_state = "tuned";
  saved->snapshot.set_snapshot_id("snapshot");
  const std::vector<v1::ExecuteRequest> sent = sends.Send();
  ASSERT_THAT(sent, SizeIs(2));
  EXPECT_TRUE(sent[0].attach().fresh());
  EXPECT_EQ(sent[0].attach().initial_state(), "tuned");
  EXPECT_FALSE(sent[1].attach().fresh());
  EXPECT_EQ(sent[1].attach().snapshot().snapshot_id(), "snapshot");
  EXPECT_EQ(sent[1].attach().position(), 10);
  EXPECT_FALSE(sent[1].attach().keep());
  EXPECT_EQ(fresh->attach_since, sends.core.world.now) << "from now on it is late";
}

TEST(LaneCommandsTest, OneThatWasCancelledBeforeItWasSentIsAttachedAndReleased) {
  Sends sends;
  const TurnPtr turn = sends.Admit(0, 0);
  sends.core.turns.Unseat(*turn);
  const std::vector<v1::ExecuteRequest> sent = sends.Send();
  ASSERT_THAT(sent, SizeIs(1));
  EXPECT_TRUE(sent[0].attach().fresh());
  EXPECT_TRUE(sent[0].attach().has_sampling()) << "or the worker refuses it";
}

TEST(LaneCommandsTest, WhatCountsAsGeneratedIsSaidWithTheSlot) {
  Sends sends;
  const TurnPtr turn = sends.Admit(0, 0);
  turn->counted = {1};
  turn->spec.mutable_sampling()->set_penalize_prompt(true);
  turn->prompt = {2, 3};
  turn->answer->Push(4, 0, {});
  EXPECT_THAT(sends.Send().at(0).attach().turn_token_ids(), ElementsAre(1, 2, 3, 4));
}

TEST(LaneCommandsTest, AStepHasTheTokensOfItsPositionsAndDrawsAfterTheLast) {
  Sends sends;
  const TurnPtr turn = sends.Admit(2, 1);
  Scheduler& scheduler = sends.core.lane().scheduler;
  sends.Send();
  scheduler.OnAttached(turn->sequence);
  scheduler.Feed(turn->sequence, 4, Scheduler::FeedKind::kPrefill);
  turn->set_phase(Phase::kRunning);
  const std::vector<v1::ExecuteRequest> sent = sends.Send();
  ASSERT_THAT(sent, SizeIs(1));
  ASSERT_THAT(sent[0].step().entries(), SizeIs(1));
  const v1::StepEntry& entry = sent[0].step().entries(0);
  EXPECT_EQ(entry.expected_position(), 1);
  EXPECT_THAT(entry.token_ids(), ElementsAre(9, 1, 2, 3)) << "the log's, then its own";
  EXPECT_TRUE(entry.sample());
  EXPECT_GE(turn->planned_end, 5);
  EXPECT_THAT(turn->tail, IsEmpty());
  EXPECT_EQ(turn->first_rows, sends.core.world.now);
}

TEST(LaneCommandsTest, NothingIsDrawnBeforeAllIsFed) {
  Sends sends;
  const TurnPtr turn = sends.Admit(0, 0);
  Scheduler& scheduler = sends.core.lane().scheduler;
  sends.Send();
  scheduler.OnAttached(turn->sequence);
  scheduler.Feed(turn->sequence, 2, Scheduler::FeedKind::kPrefill);
  turn->set_phase(Phase::kRunning);
  const v1::StepEntry entry = sends.Send().at(0).step().entries(0);
  EXPECT_FALSE(entry.sample());
  EXPECT_EQ(turn->planned_end, 2);
}

TEST(LaneCommandsTest, ASaveThatWasGivenUpMeanwhileIsNotSent) {
  Sends sends;
  const TurnPtr turn = sends.core.Seat("");
  const PendingSave* const save = sends.core.saves.Begin(*turn);
  ASSERT_NE(save, nullptr);
  const std::string id = save->snapshot_id;
  std::vector<v1::ExecuteRequest> sent = sends.Send();
  ASSERT_THAT(sent, SizeIs(1));
  EXPECT_EQ(sent[0].save().snapshot_id(), id);
  EXPECT_EQ(sent[0].save().expected_position(), 3);
  sends.core.saves.Begin(*turn);
  sends.core.lane().save_ids.clear();
  EXPECT_THAT(sends.Send(), IsEmpty());
}

}  // namespace
}  // namespace rwkv::router
