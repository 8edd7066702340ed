#include "services/router/core/step_results.h"

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/grpc_status.h"
#include "services/router/core/core_testing.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// A turn whose input of three tokens has come back but for the last one.
struct Runs {
  explicit Runs(const std::string& session = "") : turn(core.Seat("", session)) {
    turn->spec.set_max_tokens(10);
    turn->answer.emplace(nullptr, turn->spec);
    turn->done_end = 2;
  }
  void Come(uint64_t position, int token = -1, const absl::Status& status = absl::OkStatus()) {
    v1::StepResult result;
    v1::EntryResult& entry = *result.add_entries();
    entry.set_sequence(turn->sequence);
    entry.set_position(position);
    *entry.mutable_status() = common::ToStatusProto(status);
    if (token >= 0) entry.set_token_id(token);
    results.OnStep(core.lane(), result);
  }

  CoreParts core{{}};
  LoadGauges gauges{core.context, core.turns, core.line, core.placement};
  StepResults results{core.context, core.turns, &core.slots, &core.ends, &gauges};
  TurnPtr turn;
};

TEST(StepResultsTest, ATokenIsKnownFromThenOn) {
  Runs runs;
  runs.core.world.now += absl::Seconds(1);
  runs.Come(3, 7);
  EXPECT_EQ(runs.turn->done_end, 3);
  EXPECT_THAT(runs.turn->answer->ids(), ElementsAre(7));
  EXPECT_EQ(runs.turn->KnownEnd(), 4);
  EXPECT_EQ(runs.turn->first_token, runs.core.world.now);
  EXPECT_EQ(runs.core.lane().last_progress, runs.core.world.now);
  EXPECT_EQ(runs.turn->patience.furthest(), 3);
}

// As a worker hands them on whose own steps follow each other fast.
TEST(StepResultsTest, ResultsOfSeveralStepsComeTogether) {
  Runs runs;
  runs.turn->planned_end = 5;
  v1::StepResult result;
  for (uint64_t position = 3; position <= 5; ++position) {
    v1::EntryResult& entry = *result.add_entries();
    entry.set_sequence(runs.turn->sequence);
    entry.set_position(position);
    entry.set_token_id(position + 4);
  }
  runs.results.OnStep(runs.core.lane(), result);
  EXPECT_EQ(runs.turn->done_end, 5);
  EXPECT_THAT(runs.turn->answer->ids(), ElementsAre(7, 8, 9));
}

// Law S4: what a slot says it has seen is what it was sent.
TEST(StepResultsTest, APositionBeyondWhatWasSentFailsTheSlot) {
  Runs runs;
  runs.Come(4);
  EXPECT_EQ(runs.turn->phase(), Phase::kParked);
  EXPECT_EQ(runs.turn->sequence, 0);
  EXPECT_TRUE(runs.turn->no_warm);
  EXPECT_GT(runs.turn->not_before, runs.core.world.now);
  EXPECT_TRUE(runs.turn->kind->IsOpen());
}

TEST(StepResultsTest, ATokenForAnotherPositionFailsTheSlot) {
  Runs runs;
  runs.turn->planned_end = 4;
  runs.Come(2, 7);
  EXPECT_EQ(runs.turn->phase(), Phase::kParked);
  EXPECT_THAT(runs.turn->answer->ids(), IsEmpty());
}

TEST(StepResultsTest, ATokenThatNobodyAskedForFailsTheSlot) {
  Runs runs;
  runs.turn->answer->Finish(v1::FINISH_REASON_LENGTH, absl::nullopt, "");
  runs.Come(3, 7);
  EXPECT_EQ(runs.turn->sequence, 0);
}

TEST(StepResultsTest, WhatIsRefusedTwiceIsTheEnd) {
  Runs runs;
  const auto stream = std::make_shared<HeldStream>();
  runs.turn->kind = std::make_unique<GenerateCall>(stream);
  for (int i = 0; i < Patience::kSameRefusals; ++i) {
    EXPECT_THAT(stream->closed, IsEmpty());
    if (i > 0) {
      runs.core.turns.Seat(runs.turn);
      runs.turn->lane = &runs.core.lane();
      runs.turn->set_phase(Phase::kRunning);
    }
    runs.Come(3, -1, absl::InvalidArgumentError("no such token"));
  }
  EXPECT_THAT(stream->closed, ElementsAre(StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no such token"))));
  EXPECT_EQ(runs.turn->phase(), Phase::kComputed);
}

TEST(StepResultsTest, WhatBelongsToASequenceThatIsGoneIsDropped) {
  Runs runs;
  const SequenceId gone = runs.turn->sequence;
  runs.core.slots.Remove(*runs.turn);
  v1::StepResult result;
  result.add_entries()->set_sequence(gone);
  runs.results.OnStep(runs.core.lane(), result);
  v1::SequenceStopped stopped;
  stopped.set_sequence(gone);
  runs.results.OnStopped(stopped);
  EXPECT_EQ(runs.turn->done_end, 2);
}

TEST(StepResultsTest, ASequenceThatStoppedUntoldFailsItsSlot) {
  Runs runs;
  v1::SequenceStopped stopped;
  stopped.set_sequence(runs.turn->sequence);
  stopped.set_position(3);
  runs.results.OnStopped(stopped);
  EXPECT_EQ(runs.turn->phase(), Phase::kParked);
}

}  // namespace
}  // namespace rwkv::router
