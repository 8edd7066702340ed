#include "services/worker/engine/own_steps.h"

#include <cstdint>
#include <functional>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace rwkv::worker {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr int kSlot = 3;
constexpr uint64_t kSequence = 7;

v1::AttachSequence Attach(int slot, uint64_t sequence, std::vector<uint32_t> stops = {}) {
  v1::AttachSequence attach;
  attach.set_slot(slot);
  attach.set_sequence(sequence);
  attach.mutable_stop_token_ids()->Add(stops.begin(), stops.end());
  return attach;
}

v1::Step Step(int slot, uint64_t sequence, uint64_t until) {
  v1::Step step;
  v1::StepEntry& entry = *step.add_entries();
  entry.set_slot(slot);
  entry.set_sequence(sequence);
  entry.set_sample(true);
  entry.set_go_on_until(until);
  return step;
}

v1::StepResult Result(int slot, uint64_t sequence, uint64_t position, uint32_t token) {
  v1::StepResult result;
  v1::EntryResult& entry = *result.add_entries();
  entry.set_slot(slot);
  entry.set_sequence(sequence);
  entry.set_position(position);
  entry.set_token_id(token);
  return result;
}

v1::GoOn GoOn(uint64_t until) {
  v1::GoOn go_on;
  go_on.set_slot(kSlot);
  go_on.set_sequence(kSequence);
  go_on.set_until(until);
  return go_on;
}

v1::GoOn Knowing(uint64_t until, uint64_t known) {
  v1::GoOn go_on = GoOn(until);
  go_on.set_known(known);
  return go_on;
}

std::vector<int> Slots(const v1::Step& step) {
  std::vector<int> slots;
  for (const v1::StepEntry& entry : step.entries()) slots.push_back(entry.slot());
  return slots;
}

// One sequence that has seen 10 tokens, drawn token 42, and may go on until 12.
class OwnStepsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    own_.OnAttach(Attach(kSlot, kSequence, {5, 50}));
    own_.OnStep(Step(kSlot, kSequence, 12));
    EXPECT_FALSE(own_.ready()) << "nothing is drawn yet";
    EXPECT_THAT(own_.OnResult(Result(kSlot, kSequence, 10, 42)), IsEmpty());
  }
  // Its next step, with what is drawn then.
  void Go(uint64_t position, uint32_t draws) {
    own_.OnStep(own_.Next(8));
    own_.OnResult(Result(kSlot, kSequence, position, draws));
  }

  OwnSteps own_;
};

TEST_F(OwnStepsTest, WaitsWhereTheAnswerMayEndUntilTheRouterKnowsOfIt) {
  v1::AttachSequence attach = Attach(kSlot, kSequence);
  attach.add_pause_token_ids(42);
  own_.OnAttach(attach);
  own_.OnStep(Step(kSlot, kSequence, 20));
  own_.OnResult(Result(kSlot, kSequence, 10, 42));
  EXPECT_FALSE(own_.ready());
  own_.OnGoOn(Knowing(30, 9));
  EXPECT_FALSE(own_.ready()) << "said before the router had it";
  own_.OnGoOn(Knowing(30, 10));
  EXPECT_TRUE(own_.ready());
  Go(11, 7);
  EXPECT_TRUE(own_.ready());
  Go(12, 42);
  EXPECT_FALSE(own_.ready());
  EXPECT_THAT(own_.OnGoOn(GoOn(0)), ::testing::SizeIs(1)) << "it stands there";
}

// Of several stages the first hears of a result later than the router, and perhaps later than the router's answer.
TEST_F(OwnStepsTest, WaitsForNothingThatTheRouterKnewBefore) {
  v1::AttachSequence attach = Attach(kSlot, kSequence);
  attach.add_pause_token_ids(42);
  own_.OnAttach(attach);
  own_.OnStep(Step(kSlot, kSequence, 20));
  own_.OnGoOn(Knowing(30, 10));
  own_.OnResult(Result(kSlot, kSequence, 10, 42));
  EXPECT_TRUE(own_.ready());
  own_.OnGoOn(Knowing(30, 8));
  Go(11, 42);
  EXPECT_FALSE(own_.ready()) << "of this one it knows nothing";
}

TEST_F(OwnStepsTest, FeedsWhatWasDrawnUntilTheEnd) {
  ASSERT_TRUE(own_.ready());
  const v1::Step step = own_.Next(8);
  ASSERT_EQ(step.entries_size(), 1);
  EXPECT_EQ(step.entries(0).slot(), kSlot);
  EXPECT_EQ(step.entries(0).sequence(), kSequence);
  EXPECT_EQ(step.entries(0).expected_position(), 10u);
  EXPECT_THAT(step.entries(0).token_ids(), ElementsAre(42));
  EXPECT_TRUE(step.entries(0).sample());
  own_.OnStep(step);
  EXPECT_FALSE(own_.ready()) << "its step is not back";
  own_.OnResult(Result(kSlot, kSequence, 11, 43));
  EXPECT_TRUE(own_.ready());
  Go(12, 44);
  EXPECT_FALSE(own_.ready()) << "it has come to where it may";
}

TEST_F(OwnStepsTest, GoesOnWhenItIsSaidAgain) {
  Go(11, 43);
  Go(12, 44);
  EXPECT_THAT(own_.OnGoOn(GoOn(13)), IsEmpty());
  ASSERT_TRUE(own_.ready());
  const v1::Step step = own_.Next(8);
  EXPECT_THAT(step.entries(0).token_ids(), ElementsAre(44));
  EXPECT_EQ(step.entries(0).expected_position(), 12u);
}

TEST_F(OwnStepsTest, StopsAfterAStopToken) {
  Go(11, 50);
  EXPECT_FALSE(own_.ready());
  own_.OnGoOn(GoOn(100));
  EXPECT_FALSE(own_.ready()) << "nothing follows a stop token";
}

TEST_F(OwnStepsTest, SaysWhereItStopped) {
  const OwnSteps::Stopped stopped = own_.OnGoOn(GoOn(0));
  ASSERT_EQ(stopped.size(), 1u);
  EXPECT_EQ(stopped[0].slot(), kSlot);
  EXPECT_EQ(stopped[0].sequence(), kSequence);
  EXPECT_EQ(stopped[0].position(), 10u);
  EXPECT_FALSE(own_.ready());
}

TEST_F(OwnStepsTest, SaysThatItStoppedAfterWhatIsInFlight) {
  own_.OnStep(own_.Next(8));
  EXPECT_THAT(own_.OnGoOn(GoOn(0)), IsEmpty());
  const OwnSteps::Stopped stopped = own_.OnResult(Result(kSlot, kSequence, 11, 43));
  ASSERT_EQ(stopped.size(), 1u);
  EXPECT_EQ(stopped[0].position(), 11u);
  EXPECT_FALSE(own_.ready());
  own_.OnGoOn(GoOn(12));
  EXPECT_TRUE(own_.ready()) << "it can be sent on again";
}

TEST_F(OwnStepsTest, StopsAfterARefusal) {
  own_.OnStep(own_.Next(8));
  v1::StepResult refused = Result(kSlot, kSequence, 10, 0);
  refused.mutable_entries(0)->clear_token_id();
  refused.mutable_entries(0)->mutable_status()->set_code(10);
  own_.OnResult(refused);
  own_.OnGoOn(GoOn(100));
  EXPECT_FALSE(own_.ready());
}

TEST_F(OwnStepsTest, AStepOfTheRouterTakesItOver) {
  own_.OnStep(Step(kSlot, kSequence, 0));
  own_.OnResult(Result(kSlot, kSequence, 11, 43));
  EXPECT_FALSE(own_.ready());
}

TEST_F(OwnStepsTest, ASlotThatIsAnothersGoesNotOn) {
  own_.OnStep(own_.Next(8));
  own_.OnAttach(Attach(kSlot, kSequence + 1));
  own_.OnResult(Result(kSlot, kSequence, 11, 43));  // Of who had it before.
  EXPECT_FALSE(own_.ready());
  EXPECT_THAT(own_.OnGoOn(GoOn(100)), IsEmpty());
  EXPECT_FALSE(own_.ready());
}

TEST_F(OwnStepsTest, ASlotThatIsAttachedAnewBeginsAnew) {
  v1::AttachSequence attach = Attach(kSlot, kSequence);
  attach.set_position(4);
  own_.OnAttach(attach);
  own_.OnGoOn(GoOn(100));
  EXPECT_FALSE(own_.ready()) << "what was drawn before is gone";
  const OwnSteps::Stopped stopped = own_.OnGoOn(GoOn(0));
  ASSERT_EQ(stopped.size(), 1u);
  EXPECT_EQ(stopped[0].position(), 4u);
}

TEST_F(OwnStepsTest, WhatIsSaidOfASlotThatIsNobodysIsNotHeard) {
  for (const uint64_t sequence : {0, 1, 2}) {
    own_.OnStep(Step(9, sequence, 100));
    EXPECT_THAT(own_.OnResult(Result(9, sequence, 1, 2)), IsEmpty());
    v1::GoOn go_on = GoOn(0);
    go_on.set_slot(9);
    go_on.set_sequence(sequence);
    EXPECT_THAT(own_.OnGoOn(go_on), IsEmpty());
  }
  EXPECT_THAT(Slots(own_.Next(8)), ElementsAre(kSlot));
}

TEST_F(OwnStepsTest, WithTwoStepsInFlightItWaitsForBoth) {
  for (int i = 0; i < 2; ++i) own_.OnStep(Step(kSlot, kSequence, 100));
  own_.OnResult(Result(kSlot, kSequence, 11, 43));
  EXPECT_FALSE(own_.ready());
  EXPECT_THAT(own_.OnGoOn(GoOn(0)), IsEmpty());
  own_.OnStep(Step(kSlot, kSequence, 100));
  EXPECT_THAT(own_.OnResult(Result(kSlot, kSequence, 12, 44)), IsEmpty()) << "one is in flight";
  EXPECT_THAT(own_.OnResult(Result(kSlot, kSequence, 13, 45)), ::testing::SizeIs(1));
  own_.OnStep(Step(kSlot, kSequence, 100));
  EXPECT_THAT(own_.OnResult(Result(kSlot, kSequence, 14, 46)), IsEmpty()) << "it has said so";
}

TEST_F(OwnStepsTest, AfterARefusalNoResultSendsItOn) {
  for (int i = 0; i < 2; ++i) own_.OnStep(Step(kSlot, kSequence, 100));
  v1::StepResult refused = Result(kSlot, kSequence, 10, 0);
  refused.mutable_entries(0)->mutable_status()->set_code(10);
  own_.OnResult(refused);
  own_.OnResult(Result(kSlot, kSequence, 11, 43));
  EXPECT_FALSE(own_.ready());
}

TEST_F(OwnStepsTest, WhereNothingIsDrawnItDoesNotGoOn) {
  own_.OnStep(Step(kSlot, kSequence, 100));
  v1::StepResult result = Result(kSlot, kSequence, 11, 0);
  result.mutable_entries(0)->clear_token_id();
  own_.OnResult(result);
  EXPECT_FALSE(own_.ready());
}

TEST_F(OwnStepsTest, OneTokenIsNoStop) {
  own_.OnAttach(Attach(kSlot, kSequence));
  EXPECT_THAT(own_.OnGoOn(GoOn(1)), IsEmpty());
}

TEST_F(OwnStepsTest, AReleasedSlotGoesNotOn) {
  v1::ReleaseSlot release;
  release.set_slot(kSlot);
  release.set_sequence(kSequence + 1);
  own_.OnRelease(release);
  EXPECT_TRUE(own_.ready()) << "it is not that one's";
  release.set_sequence(kSequence);
  own_.OnRelease(release);
  EXPECT_FALSE(own_.ready());
}

TEST_F(OwnStepsTest, TheLongestWaitingGoFirst) {
  for (const int slot : {1, 2}) {
    own_.OnAttach(Attach(slot, slot));
    own_.OnStep(Step(slot, slot, 100));
    own_.OnResult(Result(slot, slot, 10, 42));
  }
  EXPECT_THAT(Slots(own_.Next(2)), ElementsAre(3, 1));
  const v1::Step step = own_.Next(2);
  own_.OnStep(step);
  EXPECT_THAT(Slots(own_.Next(2)), ElementsAre(2));
  own_.OnResult(Result(kSlot, kSequence, 11, 43));
  EXPECT_THAT(Slots(own_.Next(2)), ElementsAre(2, 3));
}

// Slots 10 .. 10 + count that may go on.
void AddReady(OwnSteps& own, int count) {
  for (int slot = 10; slot < 10 + count; ++slot) {
    own.OnAttach(Attach(slot, slot));
    own.OnStep(Step(slot, slot, 100));
    own.OnResult(Result(slot, slot, 10, 42));
  }
}

TEST(OwnStepsOfStagesTest, EachStageHasItsShare) {
  struct Row {
    int ready, most, stages, taken;
  };
  for (const Row& row : {Row{1, 8, 3, 1}, Row{2, 8, 2, 1}, Row{3, 8, 2, 2}, Row{5, 8, 3, 2}, Row{6, 8, 3, 2},
                         Row{7, 8, 3, 3}, Row{7, 2, 3, 2}, Row{7, 8, 1, 7}, Row{9, 8, 1, 8}}) {
    OwnSteps own;
    AddReady(own, row.ready);
    EXPECT_EQ(own.Next(row.most, row.stages).entries_size(), row.taken)
        << row.ready << " ready, at most " << row.most << ", " << row.stages << " stages";
  }
}

// Two may go on, so that of two stages each has one; with a third that will, a step has two.
TEST(OwnStepsOfStagesTest, WhoWillGoOnCountsToo) {
  const auto taken = [](const std::function<void(OwnSteps&)>& third) {
    OwnSteps own;
    AddReady(own, 2);
    v1::AttachSequence attach = Attach(kSlot, kSequence, {5});
    attach.add_pause_token_ids(6);
    own.OnAttach(attach);
    third(own);
    return own.Next(8, 2).entries_size();
  };
  EXPECT_EQ(taken([](OwnSteps& own) {}), 1) << "it has not begun";
  EXPECT_EQ(taken([](OwnSteps& own) { own.OnStep(Step(kSlot, kSequence, 20)); }), 2) << "its step is in flight";
  EXPECT_EQ(taken([](OwnSteps& own) { own.OnStep(Step(kSlot, kSequence, 0)); }), 1) << "it is the router's";
  const auto drew = [](uint64_t position, uint32_t token) {
    return [position, token](OwnSteps& own) {
      own.OnStep(Step(kSlot, kSequence, 20));
      own.OnResult(Result(kSlot, kSequence, position, token));
    };
  };
  EXPECT_EQ(taken(drew(19, 4)), 2) << "it may go on";
  EXPECT_EQ(taken(drew(20, 4)), 1) << "it has come to where it may";
  EXPECT_EQ(taken(drew(19, 5)), 1) << "a stop token";
  EXPECT_EQ(taken(drew(19, 6)), 1) << "it waits for the router";
  EXPECT_EQ(taken([&](OwnSteps& own) {
              drew(15, 6)(own);
              own.OnStep(Step(kSlot, kSequence, 20));
            }),
            2)
      << "the router took it over where it waited";
}

}  // namespace
}  // namespace rwkv::worker
