#include "services/router/core/turn_progress.h"

#include <memory>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/router/core/core_testing.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using Phase = Turn::Phase;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

// A turn in a slot, whose input of three tokens has come back and whose `drawn` tokens are known.
struct Progress {
  explicit Progress(const std::string& session, int drawn = 0) : turn(core.Seat("", session)) {
    turn->spec.set_max_tokens(10);
    turn->answer.emplace(nullptr, turn->spec);
    for (int i = 0; i < drawn; ++i) turn->answer->Push(5, 0, {});
  }
  static TurnOptions Options() {
    TurnOptions options;
    options.max_uncommitted_tokens = 4;
    options.max_stream_messages = 6;
    return options;
  }
  void Advance() { progress.Advance(turn); }

  CoreParts core{Options()};
  GoingOn going_on{core.context, &core.saves};
  TurnProgress progress{core.context, going_on, &core.saves, &core.streams, &core.slots, &core.ends};
  TurnPtr turn;
};

TEST(TurnProgressTest, ATokenThatIsKnownIsFed) {
  Progress progress("", 1);
  progress.Advance();
  EXPECT_EQ(progress.turn->fed_end, 4);
  progress.Advance();
  EXPECT_EQ(progress.turn->fed_end, 4) << "once";
}

TEST(TurnProgressTest, NothingIsFedWhileItsLogIsBeingRead) {
  Progress progress("", 1);
  progress.turn->tail_pending = true;
  progress.Advance();
  EXPECT_EQ(progress.turn->fed_end, 3);
}

TEST(TurnProgressTest, ItStopsWhereTooMuchIsNotInTheLogYet) {
  Progress progress("s", 4);
  progress.Advance();
  EXPECT_EQ(progress.turn->fed_end, 3);
  progress.turn->durable = 1;
  progress.Advance();
  EXPECT_EQ(progress.turn->fed_end, 7);
}

TEST(TurnProgressTest, ItStopsWhereTooMuchIsNotWithItsClient) {
  Progress progress("", 6);
  progress.Advance();
  EXPECT_EQ(progress.turn->fed_end, 3);
  progress.turn->sent = 1;
  progress.Advance();
  EXPECT_EQ(progress.turn->fed_end, 9);
}

TEST(TurnProgressTest, AnAnswerWithALogLeavesItsSlotWarmOnceAllHasComeBack) {
  Progress progress("s", 1);
  progress.turn->answer->Finish(v1::FINISH_REASON_STOP_STRING, absl::nullopt, "x");
  progress.turn->fed_end = 4;
  progress.Advance();
  EXPECT_EQ(progress.turn->phase(), Phase::kRunning);
  progress.turn->done_end = progress.turn->planned_end = 4;
  progress.Advance();
  EXPECT_EQ(progress.turn->phase(), Phase::kComputed);
  EXPECT_EQ(progress.core.lane().scheduler.slots_warm(), 1);
}

TEST(TurnProgressTest, AnAnswerWithoutOneLeavesItsSlotAtOnce) {
  Progress progress("", 1);
  progress.turn->answer->Finish(v1::FINISH_REASON_LENGTH, absl::nullopt, "");
  progress.turn->fed_end = 4;
  progress.Advance();
  EXPECT_EQ(progress.turn->phase(), Phase::kComputed);
  EXPECT_EQ(progress.core.lane().scheduler.slots_warm(), 0);
}

TEST(TurnProgressTest, ATurnThatOnlyReadsIsOverWhenItsInputHasComeBack) {
  Progress progress("");
  progress.turn->spec.set_max_tokens(0);
  progress.turn->done_end = 2;
  progress.Advance();
  EXPECT_FALSE(progress.turn->decided());
  progress.turn->done_end = 3;
  progress.Advance();
  EXPECT_EQ(progress.turn->answer->reason(), v1::FINISH_REASON_LENGTH);
}

TEST(TurnProgressTest, WhoYieldsDoesSoWhenAllHasComeBackAndIsFedNoMore) {
  Progress progress("", 1);
  progress.turn->set_yielding(true);
  progress.turn->done_end = 2;
  progress.Advance();
  EXPECT_EQ(progress.turn->phase(), Phase::kRunning);
  EXPECT_EQ(progress.turn->fed_end, 3);
  progress.turn->done_end = 3;
  progress.Advance();
  EXPECT_EQ(progress.turn->phase(), Phase::kYielded);
  EXPECT_THAT(progress.core.line.turns(), ElementsAre(progress.turn));
}

TEST(TurnProgressTest, TheStateOfATurnWithoutASessionIsItsOwn) {
  Progress progress("");
  progress.turn->saves = 1;
  PendingSave save;
  save.snapshot_id = "snapshot";
  save.position = 3;
  progress.progress.OnSaveEnded(*progress.turn, save, true, absl::OkStatus());
  EXPECT_EQ(progress.turn->saves, 0);
  EXPECT_EQ(progress.turn->own_snapshot.snapshot_id(), "snapshot");
  EXPECT_THAT(progress.core.world.jobs, IsEmpty()) << "there was none before it to drop";
}

}  // namespace
}  // namespace rwkv::router
