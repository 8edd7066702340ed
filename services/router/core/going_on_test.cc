#include "services/router/core/going_on.h"

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/router/core/core_testing.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

TurnOptions Options() {
  TurnOptions options;
  options.max_stream_messages = 20;
  options.max_uncommitted_tokens = 8;
  options.snapshot_interval_tokens = 100;
  return options;
}

// A turn of three tokens in a slot, all of which came back.
struct Going {
  explicit Going(const std::string& session, uint32_t max_tokens) : turn(core.Seat("", session)) {
    turn->spec.set_max_tokens(max_tokens);
    turn->answer.emplace(nullptr, turn->spec);
  }
  uint64_t Begin() {
    v1::StepEntry entry;
    going_on.Begin(*turn, &entry);
    return entry.go_on_until();
  }
  // A token was drawn after all that came back, and is durable.
  void Come(uint64_t position) {
    turn->done_end = position;
    turn->answer->Push(5, 0, {});
    turn->durable = turn->answer->size();
  }
  // Where the worker is told to go; 0: to stop.
  std::vector<uint64_t> Told() {
    std::vector<uint64_t> until;
    for (const Command& command : core.lane().scheduler.Plan()) {
      if (const auto* go_on = std::get_if<GoOnCommand>(&command)) until.push_back(go_on->until);
    }
    return until;
  }

  CoreParts core{Options()};
  GoingOn going_on{core.context, &core.saves};
  TurnPtr turn;
};

TEST(GoingOnTest, TheLastTokenIsDrawnAndNotFed) {
  Going going("", 10);
  EXPECT_EQ(going.Begin(), 3 + 10 - 1);
  EXPECT_TRUE(going.turn->Going());
}

TEST(GoingOnTest, NoFurtherThanItsClientTakes) {
  Going going("", 1000);
  EXPECT_EQ(going.Begin(), 3 + 20 - 1);
}

TEST(GoingOnTest, WithALogNoFurtherThanMayBeUncommitted) {
  Going going("s", 1000);
  EXPECT_EQ(going.Begin(), 3 + 8 - 1);
}

TEST(GoingOnTest, WithALogNoFurtherThanTheNextSnapshot) {
  Going going("s", 1000);
  going.turn->saved_position = 0;
  going.turn->durable = 200;
  going.turn->sent = 200;
  EXPECT_EQ(going.Begin(), 100);
}

TEST(GoingOnTest, ItIsToldToGoFurtherBeforeItWaits) {
  Going going("s", 1000);
  const uint64_t first = going.Begin();
  going.Come(first - 7);
  going.going_on.Advance(*going.turn, false);
  EXPECT_THAT(going.Told(), IsEmpty());  // It is far from there.
  for (uint64_t position = first - 6; position <= first - 3; ++position) going.Come(position);
  going.going_on.Advance(*going.turn, false);
  EXPECT_THAT(going.Told(), ElementsAre(3 + 5 + 8 - 1));
  going.turn->going_on.halting = true;
  going.Come(first - 2);
  going.going_on.Advance(*going.turn, false);
  EXPECT_THAT(going.Told(), IsEmpty());
}

TEST(GoingOnTest, OneThatPausedIsToldAtOnce) {
  Going going("s", 1000);
  const uint64_t first = going.Begin();
  going.Come(first - 7);
  going.turn->going_on.paused = true;
  going.going_on.Advance(*going.turn, false);
  EXPECT_THAT(going.Told(), ElementsAre(3 + 1 + 8 - 1));
  EXPECT_FALSE(going.turn->going_on.paused);
}

TEST(GoingOnTest, ItStandsWhereItStoppedOnceAllResultsAreThere) {
  Going going("s", 1000);
  going.Begin();
  EXPECT_THAT(GoingOn::Stopped(*going.turn, 5), StatusIs(absl::StatusCode::kInternal));  // Nobody told it to.
  GoingOn::Halt(*going.turn);
  GoingOn::Halt(*going.turn);
  EXPECT_THAT(going.Told(), ElementsAre(0));
  EXPECT_THAT(GoingOn::Stopped(*going.turn, 2), StatusIs(absl::StatusCode::kInternal));
  EXPECT_THAT(GoingOn::Stopped(*going.turn, 11), StatusIs(absl::StatusCode::kInternal));
  EXPECT_THAT(GoingOn::Stopped(*going.turn, 5), IsOk());
  EXPECT_TRUE(going.turn->going_on.halting);
  going.Come(4);
  GoingOn::Settle(*going.turn);
  EXPECT_TRUE(going.turn->Going());
  going.Come(5);
  GoingOn::Settle(*going.turn);
  EXPECT_FALSE(going.turn->going_on.halting);
  EXPECT_FALSE(going.turn->Going());
  EXPECT_EQ(going.turn->fed_end, 5);
}

TEST(GoingOnTest, ItWaitsAfterATokenThatMayCompleteAStop) {
  Going going("s", 1000);
  going.turn->pause_token_ids = std::vector<uint32_t>{4, 5};
  going.Begin();
  going.Come(4);
  EXPECT_TRUE(GoingOn::FollowStop(*going.turn, 5));
  EXPECT_TRUE(going.turn->going_on.paused);
  EXPECT_TRUE(GoingOn::FollowStop(*going.turn, 6));
  EXPECT_FALSE(going.turn->going_on.paused);
}

TEST(GoingOnTest, AtTheEndOfAnAnswerTheSlotIsWhereItsWorkerSawIt) {
  Going going("", 1000);
  going.Begin();
  going.Come(4);
  going.turn->answer->Finish(v1::FINISH_REASON_STOP_TOKEN, 7, "");
  EXPECT_TRUE(GoingOn::FollowStop(*going.turn, 7));
  EXPECT_FALSE(going.turn->Going());

  Going beyond("", 1000);
  beyond.Begin();
  beyond.Come(4);
  beyond.turn->answer->Finish(v1::FINISH_REASON_STOP_STRING, absl::nullopt, "x");
  EXPECT_FALSE(GoingOn::FollowStop(*beyond.turn, 7));
}

TEST(GoingOnTest, NoneBeginsThatYieldsOrMayStopAnywhere) {
  Going going("s", 1000);
  EXPECT_TRUE(GoingOn::MayBegin(*going.turn));
  going.turn->pause_token_ids = absl::nullopt;
  EXPECT_FALSE(GoingOn::MayBegin(*going.turn));
  Going yielding("", 1000);
  EXPECT_TRUE(GoingOn::MayBegin(*yielding.turn));
  yielding.turn->set_yielding(true);
  EXPECT_FALSE(GoingOn::MayBegin(*yielding.turn));
}

}  // namespace
}  // namespace rwkv::router
