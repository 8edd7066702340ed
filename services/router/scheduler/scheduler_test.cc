#include "services/router/scheduler/scheduler.h"

#include <algorithm>
#include <numeric>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/router/scheduler/scheduler_testing.h"

namespace rwkv::router {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::Le;
using ::testing::SizeIs;
using FeedKind = Scheduler::FeedKind;

// Admits, attaches and feeds; the steps that this starts are returned.
std::vector<StepCommand> Start(Scheduler& scheduler, SequenceId id, int tokens, FeedKind kind = FeedKind::kPrefill) {
  EXPECT_TRUE(scheduler.Admit(id, 0));
  scheduler.Plan();
  scheduler.OnAttached(id);
  scheduler.Feed(id, tokens, kind);
  return Of<StepCommand>(scheduler.Plan());
}

int Rows(const StepCommand& step) {
  return std::accumulate(step.entries.begin(), step.entries.end(), 0,
                         [](int sum, const StepCommand::Entry& entry) { return sum + entry.tokens; });
}

TEST(SchedulerTest, NothingRunsBeforeEveryStageHasAttached) {
  Scheduler scheduler(SchedulerOptions(2, 4, 128));
  ASSERT_TRUE(scheduler.Admit(1, 7));
  scheduler.Feed(1, 10, FeedKind::kPrefill);
  const std::vector<Command> commands = scheduler.Plan();
  ASSERT_THAT(commands, SizeIs(1));
  const AttachCommand& attach = std::get<AttachCommand>(commands[0]);
  EXPECT_EQ(attach.sequence, 1);
  EXPECT_EQ(attach.position, 7);
  EXPECT_FALSE(attach.warm_sequence.has_value());
  EXPECT_THAT(scheduler.Plan(), IsEmpty());
  scheduler.OnAttached(1);
  const std::vector<StepCommand> steps = Of<StepCommand>(scheduler.Plan());
  ASSERT_THAT(steps, SizeIs(1));
  ASSERT_THAT(steps[0].entries, SizeIs(1));
  EXPECT_EQ(steps[0].entries[0].position, 7);
  EXPECT_EQ(steps[0].entries[0].tokens, 10);
  EXPECT_TRUE(steps[0].entries[0].last);
}

TEST(SchedulerTest, ChunksOfOnePromptFillThePipelineWithoutWaiting) {
  Scheduler scheduler(SchedulerOptions(2, 4, 100));
  const std::vector<StepCommand> steps = Start(scheduler, 1, 350);
  ASSERT_THAT(steps, SizeIs(3));
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(steps[i].step_id, i + 1);
    ASSERT_THAT(steps[i].entries, SizeIs(1));
    EXPECT_EQ(steps[i].entries[0].position, 100 * i);
    EXPECT_EQ(steps[i].entries[0].tokens, 100);
    EXPECT_FALSE(steps[i].entries[0].last);
  }
  scheduler.OnStepDone(1);
  const std::vector<StepCommand> rest = Of<StepCommand>(scheduler.Plan());
  ASSERT_THAT(rest, SizeIs(1));
  EXPECT_EQ(rest[0].entries[0].tokens, 50);
  EXPECT_TRUE(rest[0].entries[0].last);
}

TEST(SchedulerTest, APromptThatFitsOneStepIsCutToFillAllStages) {
  Scheduler scheduler(SchedulerOptions(2, 4, 128));
  const std::vector<StepCommand> steps = Start(scheduler, 1, 120);
  ASSERT_THAT(steps, SizeIs(3));
  EXPECT_THAT(Rows(steps[0]), 40);
  EXPECT_TRUE(steps[2].entries[0].last);
}

TEST(SchedulerTest, DecodersSpreadOverAllMicrobatches) {
  Scheduler scheduler(SchedulerOptions(2, 32, 128));
  for (SequenceId id = 1; id <= 32; ++id) {
    ASSERT_TRUE(scheduler.Admit(id, 0));
  }
  scheduler.Plan();
  for (SequenceId id = 1; id <= 32; ++id) {
    scheduler.OnAttached(id);
    scheduler.Feed(id, 1, FeedKind::kDecode);
  }
  const std::vector<StepCommand> steps = Of<StepCommand>(scheduler.Plan());
  ASSERT_THAT(steps, SizeIs(3));
  EXPECT_THAT(steps[0].entries, SizeIs(11));
  EXPECT_THAT(steps[1].entries, SizeIs(11));
  EXPECT_THAT(steps[2].entries, SizeIs(10));
}

TEST(SchedulerTest, PrefillFillsTheRowsThatDecodeLeaves) {
  Scheduler scheduler(SchedulerOptions(1, 4, 64));
  Start(scheduler, 1, 1, FeedKind::kDecode);
  scheduler.OnStepDone(1);
  ASSERT_TRUE(scheduler.Admit(2, 0));
  scheduler.Plan();
  scheduler.OnAttached(2);
  scheduler.Feed(2, 1000, FeedKind::kPrefill);
  scheduler.Feed(1, 1, FeedKind::kDecode);
  const std::vector<StepCommand> steps = Of<StepCommand>(scheduler.Plan());
  ASSERT_THAT(steps, SizeIs(2));
  ASSERT_THAT(steps[0].entries, SizeIs(2));
  EXPECT_EQ(steps[0].entries[0].sequence, 1);
  EXPECT_EQ(steps[0].entries[1].tokens, 63);
  EXPECT_EQ(Rows(steps[1]), 64);
}

TEST(SchedulerTest, DecodeLeavesRowsToPrefill) {
  for (const int rows : {1, 2, 8, 16}) {
    SCOPED_TRACE(absl::StrCat("rows ", rows));
    Scheduler scheduler(SchedulerOptions(1, 64, rows));
    for (SequenceId id = 1; id <= 40; ++id) ASSERT_TRUE(scheduler.Admit(id, 0));
    scheduler.Plan();
    for (SequenceId id = 1; id <= 40; ++id) {
      scheduler.OnAttached(id);
      scheduler.Feed(id, id == 40 ? 1000 : 1, id == 40 ? FeedKind::kPrefill : FeedKind::kDecode);
    }
    bool prefill = false;
    bool decode = false;
    for (const StepCommand& step : Of<StepCommand>(scheduler.Plan())) {
      EXPECT_EQ(Rows(step), rows);
      for (const StepCommand::Entry& entry : step.entries) (entry.sequence == 40 ? prefill : decode) = true;
    }
    EXPECT_TRUE(prefill);
    EXPECT_TRUE(decode);
  }
}

TEST(SchedulerTest, AShortPromptOvertakesALongOneAndTheLongOneIsNotStarved) {
  Scheduler scheduler(SchedulerOptions(1, 4, 10));
  Start(scheduler, 1, 100000);
  ASSERT_TRUE(scheduler.Admit(2, 0));
  scheduler.Plan();
  scheduler.OnAttached(2);
  scheduler.Feed(2, 10, FeedKind::kPrefill);
  bool short_one_done = false;
  int long_one_rows = 0;
  for (uint64_t done = 1; done <= 4; ++done) {
    scheduler.OnStepDone(done);
    for (const StepCommand& step : Of<StepCommand>(scheduler.Plan())) {
      for (const StepCommand::Entry& entry : step.entries) {
        if (entry.sequence == 2 && entry.last) short_one_done = true;
        if (entry.sequence == 1) long_one_rows += entry.tokens;
      }
    }
  }
  EXPECT_TRUE(short_one_done);
  EXPECT_GE(long_one_rows, 20);
}

TEST(SchedulerTest, CancelReleasesTheSlotInTheNextPlan) {
  Scheduler scheduler(SchedulerOptions(1, 1, 8));
  Start(scheduler, 1, 100);
  ASSERT_TRUE(scheduler.Admit(2, 5));
  EXPECT_THAT(scheduler.Plan(), IsEmpty());
  scheduler.Cancel(1);
  const std::vector<Command> commands = scheduler.Plan();
  ASSERT_THAT(commands, SizeIs(2));
  EXPECT_EQ(std::get<ReleaseCommand>(commands[0]).sequence, 1);
  EXPECT_EQ(std::get<AttachCommand>(commands[1]).sequence, 2);
  EXPECT_EQ(std::get<AttachCommand>(commands[1]).slot, 0);
}

TEST(SchedulerTest, CancelOfOneThatWaitsLeavesTheQueue) {
  Scheduler scheduler(SchedulerOptions(1, 1, 8));
  Start(scheduler, 1, 1);
  ASSERT_TRUE(scheduler.Admit(2, 0));
  ASSERT_TRUE(scheduler.Admit(3, 0));
  scheduler.Cancel(2);
  scheduler.Cancel(1);
  const std::vector<AttachCommand> attaches = Of<AttachCommand>(scheduler.Plan());
  ASSERT_THAT(attaches, SizeIs(1));
  EXPECT_EQ(attaches[0].sequence, 3);
}

TEST(SchedulerTest, EventsOfUnknownSequencesAreIgnored) {
  Scheduler scheduler(SchedulerOptions(1, 1, 8));
  scheduler.OnAttached(9);
  scheduler.Feed(9, 1, FeedKind::kPrefill);
  scheduler.Cancel(9);
  scheduler.OnStepDone(17);
  EXPECT_EQ(scheduler.Save(9), absl::nullopt);
  EXPECT_EQ(scheduler.Retire(9, "s", "b"), absl::nullopt);
  EXPECT_FALSE(scheduler.AdmitWarm(10, 9));
  EXPECT_THAT(scheduler.Plan(), IsEmpty());
}

TEST(SchedulerTest, AFinishedSessionGoesOnInItsWarmSlot) {
  Scheduler scheduler(SchedulerOptions(1, 2, 8));
  Start(scheduler, 1, 8);
  scheduler.OnStepDone(1);
  EXPECT_EQ(scheduler.Retire(1, "session", "branch"), 8u);
  EXPECT_EQ(scheduler.slots_warm(), 1);
  EXPECT_FALSE(scheduler.FindWarm("session", "another branch", 100).has_value());
  EXPECT_FALSE(scheduler.FindWarm("another session", "branch", 100).has_value());
  EXPECT_FALSE(scheduler.FindWarm("session", "branch", 7).has_value());
  const absl::optional<Scheduler::WarmSlot> warm = scheduler.FindWarm("session", "branch", 8);
  ASSERT_TRUE(warm.has_value());
  EXPECT_EQ(warm->position, 8);
  ASSERT_TRUE(scheduler.AdmitWarm(2, warm->sequence));
  const std::vector<Command> commands = scheduler.Plan();
  ASSERT_THAT(commands, SizeIs(1));
  const AttachCommand& attach = std::get<AttachCommand>(commands[0]);
  EXPECT_EQ(attach.warm_sequence, SequenceId{1});
  EXPECT_EQ(attach.position, 8);
  EXPECT_EQ(scheduler.slots_warm(), 0);
  EXPECT_FALSE(scheduler.AdmitWarm(3, warm->sequence));
}

TEST(SchedulerTest, TheLeastRecentlyUsedWarmSlotIsEvictedFirst) {
  Scheduler scheduler(SchedulerOptions(1, 2, 8));
  for (SequenceId id = 1; id <= 2; ++id) {
    Start(scheduler, id, 1);
    scheduler.OnStepDone(id);
  }
  scheduler.Retire(2, "b", "x");
  scheduler.Retire(1, "a", "x");
  ASSERT_TRUE(scheduler.Admit(3, 0));
  const std::vector<Command> commands = scheduler.Plan();
  ASSERT_THAT(commands, SizeIs(2));
  EXPECT_EQ(std::get<ReleaseCommand>(commands[0]).sequence, 2);
  EXPECT_EQ(std::get<AttachCommand>(commands[1]).sequence, 3);
  EXPECT_TRUE(scheduler.FindWarm("a", "x", 1).has_value());
  EXPECT_FALSE(scheduler.FindWarm("b", "x", 1).has_value());
}

TEST(SchedulerTest, DropWarmFreesEverySlotOfTheSession) {
  Scheduler scheduler(SchedulerOptions(1, 2, 8));
  Start(scheduler, 1, 1);
  scheduler.OnStepDone(1);
  scheduler.Retire(1, "a", "x");
  scheduler.DropWarm("b");
  EXPECT_EQ(scheduler.slots_warm(), 1);
  scheduler.DropWarm("a");
  EXPECT_EQ(scheduler.slots_warm(), 0);
  EXPECT_THAT(Of<ReleaseCommand>(scheduler.Plan()), SizeIs(1));
}

TEST(SchedulerTest, SaveStandsBehindTheStepsBeforeIt) {
  Scheduler scheduler(SchedulerOptions(1, 2, 8));
  EXPECT_THAT(Start(scheduler, 1, 20), SizeIs(2));
  EXPECT_EQ(scheduler.Save(1), 16u);  // Two steps of 8 are out.
  scheduler.OnStepDone(1);
  const std::vector<Command> commands = scheduler.Plan();
  ASSERT_THAT(commands, SizeIs(2));
  EXPECT_EQ(std::get<SaveCommand>(commands[0]).position, 16);
  EXPECT_EQ(std::get<StepCommand>(commands[1]).entries[0].position, 16);
}

TEST(SchedulerTest, RetireDropsWhatWasNotPlanned) {
  Scheduler scheduler(SchedulerOptions(1, 2, 8));
  Start(scheduler, 1, 100);
  EXPECT_EQ(scheduler.Retire(1, "a", "x"), 16u);
  scheduler.OnStepDone(1);
  EXPECT_THAT(scheduler.Plan(), IsEmpty());
}

TEST(SchedulerTest, SlotsGoToThoseThatWaitInTurn) {
  Scheduler scheduler(SchedulerOptions(1, 1, 8));
  for (SequenceId id = 1; id <= 4; ++id) ASSERT_TRUE(scheduler.Admit(id, 0));
  std::vector<SequenceId> attached;
  for (SequenceId id = 1; id <= 4; ++id) {
    for (const AttachCommand& attach : Of<AttachCommand>(scheduler.Plan())) attached.push_back(attach.sequence);
    scheduler.Cancel(attached.back());
  }
  EXPECT_THAT(attached, ElementsAre(1, 2, 3, 4));
}

TEST(SchedulerTest, WhoHasWaitedLongestDecodesFirst) {
  // Two rows and six that decode: each waits for two others, whatever their order of admission.
  Scheduler scheduler(SchedulerOptions(1, 8, 2));
  for (SequenceId id = 1; id <= 6; ++id) ASSERT_TRUE(scheduler.Admit(id, 0));
  scheduler.Plan();
  for (SequenceId id = 1; id <= 6; ++id) scheduler.OnAttached(id);
  for (const SequenceId id : {6, 5, 4, 3, 2, 1}) scheduler.Feed(id, 1, FeedKind::kDecode);
  std::vector<SequenceId> order;
  std::vector<StepCommand> flying;
  while (order.size() < 18) {
    for (StepCommand& step : Of<StepCommand>(scheduler.Plan())) {
      for (const StepCommand::Entry& entry : step.entries) order.push_back(entry.sequence);
      flying.push_back(std::move(step));
    }
    ASSERT_THAT(flying, ::testing::Not(IsEmpty()));
    scheduler.OnStepDone(flying.front().step_id);
    for (const StepCommand::Entry& entry : flying.front().entries) scheduler.Feed(entry.sequence, 1, FeedKind::kDecode);
    flying.erase(flying.begin());
  }
  order.resize(18);
  EXPECT_THAT(order, ElementsAre(6, 5, 4, 3, 2, 1, 6, 5, 4, 3, 2, 1, 6, 5, 4, 3, 2, 1));
}

TEST(SchedulerTest, ShortPromptsWithoutEndDoNotStarveALongOne) {
  Scheduler scheduler(SchedulerOptions(1, 16, 32));
  Start(scheduler, 1, 1000);
  SequenceId next = 2;
  int64_t left = 1000 - 64;
  for (uint64_t step_id = 1; left > 0 && step_id < 200; ++step_id) {
    // Always a short one that has not been fed yet.
    ASSERT_TRUE(scheduler.Admit(next, 0));
    scheduler.Feed(next, 32, FeedKind::kPrefill);
    for (const AttachCommand& attach : Of<AttachCommand>(scheduler.Plan())) scheduler.OnAttached(attach.sequence);
    scheduler.OnStepDone(step_id);
    for (const StepCommand& step : Of<StepCommand>(scheduler.Plan())) {
      for (const StepCommand::Entry& entry : step.entries) {
        if (entry.sequence == 1) left -= entry.tokens;
        if (entry.sequence != 1 && entry.last) scheduler.Cancel(entry.sequence);
      }
    }
    ++next;
  }
  EXPECT_EQ(left, 0);
}

TEST(SchedulerTest, UnfeedDropsWhatWasNotPlanned) {
  Scheduler scheduler(SchedulerOptions(1, 2, 32));
  const std::vector<StepCommand> steps = Start(scheduler, 1, 200);
  ASSERT_THAT(steps, SizeIs(2));
  scheduler.Unfeed(1);
  scheduler.OnStepDone(1);
  EXPECT_THAT(scheduler.Plan(), IsEmpty());
  EXPECT_EQ(scheduler.Retire(1, "s", "b"), 64);
  scheduler.Unfeed(7);  // Nobody.
}

TEST(SchedulerTest, WhoGoesOnByItselfIsWhereItWasSaidToBe) {
  Scheduler scheduler(SchedulerOptions(1, 2, 32));
  Start(scheduler, 1, 10);
  scheduler.GoOn(1, 50);
  scheduler.Halt(1);
  const std::vector<GoOnCommand> commands = Of<GoOnCommand>(scheduler.Plan());
  ASSERT_THAT(commands, SizeIs(2));
  EXPECT_EQ(commands[0].sequence, 1);
  EXPECT_EQ(commands[0].until, 50);
  EXPECT_EQ(commands[1].until, 0);
  EXPECT_EQ(scheduler.Save(1), 50);
  scheduler.MoveTo(1, 30);
  EXPECT_EQ(scheduler.Save(1), 30);
  const std::vector<SaveCommand> saves = Of<SaveCommand>(scheduler.Plan());
  ASSERT_THAT(saves, SizeIs(2));
  EXPECT_EQ(saves[0].position, 50);
  EXPECT_EQ(saves[1].position, 30);
  EXPECT_EQ(scheduler.Retire(1, "s", "b"), 30);
  scheduler.GoOn(7, 50);  // Nobody.
  scheduler.Halt(7);
  scheduler.MoveTo(7, 50);
  EXPECT_THAT(scheduler.Plan(), IsEmpty());
}

TEST(SchedulerTest, AdmissionIsBounded) {
  Scheduler::Options options = SchedulerOptions(1, 2, 8);
  options.max_sequences = 3;
  Scheduler scheduler(options);
  EXPECT_TRUE(scheduler.Admit(1, 0));
  EXPECT_FALSE(scheduler.Admit(1, 0));
  EXPECT_TRUE(scheduler.Admit(2, 0));
  EXPECT_TRUE(scheduler.Admit(3, 0));
  EXPECT_FALSE(scheduler.Admit(4, 0));
  scheduler.Cancel(2);
  EXPECT_TRUE(scheduler.Admit(4, 0));
}

// Tokens between two of the first tenant's, in steps, while the second has so many sequences: the 99th percentile.
int TokenGap(int quiet, int flood, int rows, bool fair, int* flood_tokens = nullptr) {
  constexpr int kStages = 2;
  Scheduler scheduler(SchedulerOptions(kStages, quiet + flood, rows));
  for (int id = 1; id <= quiet + flood; ++id) {
    EXPECT_TRUE(scheduler.Admit(id, 0, !fair ? "" : id <= quiet ? "quiet" : "flood"));
  }
  scheduler.Plan();
  std::vector<int> gaps, last(quiet + 1, -1);
  std::vector<StepCommand> in_flight;
  for (int id = 1; id <= quiet + flood; ++id) {
    scheduler.OnAttached(id);
    scheduler.Feed(id, 1, FeedKind::kDecode);
  }
  for (int now = 0; now < 4000; ++now) {
    for (const StepCommand& step : Of<StepCommand>(scheduler.Plan())) in_flight.push_back(step);
    const StepCommand done = in_flight.front();
    in_flight.erase(in_flight.begin());
    scheduler.OnStepDone(done.step_id);
    for (const StepCommand::Entry& entry : done.entries) {
      scheduler.Feed(entry.sequence, 1, FeedKind::kDecode);
      if (static_cast<int>(entry.sequence) > quiet) {
        if (flood_tokens != nullptr) ++*flood_tokens;
        continue;
      }
      if (now > 1000 && last[entry.sequence] >= 0) gaps.push_back(now - last[entry.sequence]);
      last[entry.sequence] = now;
    }
  }
  std::sort(gaps.begin(), gaps.end());
  return gaps[gaps.size() * 99 / 100];
}

TEST(SchedulerTest, AFloodDoesNotMoveTheTokensOfAnotherTenant) {
  const int alone = TokenGap(4, 4, 4, true);
  int tokens = 0;
  EXPECT_LE(TokenGap(4, 200, 4, true, &tokens), alone * 1.1);
  EXPECT_GT(tokens, 4000);                            // Nothing is left idle for it.
  EXPECT_GT(TokenGap(4, 200, 4, false), alone * 10);  // As it would be in one line.
}

TEST(SchedulerTest, ALongPromptOfOneTenantDoesNotHoldUpAnothers) {
  Scheduler scheduler(SchedulerOptions(1, 4, 64));
  ASSERT_TRUE(scheduler.Admit(1, 0, "long"));
  ASSERT_TRUE(scheduler.Admit(2, 0, "long"));
  ASSERT_TRUE(scheduler.Admit(3, 0, "short"));
  scheduler.Plan();
  for (const SequenceId id : {1, 2, 3}) scheduler.OnAttached(id);
  scheduler.Feed(1, 10000, FeedKind::kPrefill);
  scheduler.Feed(2, 10000, FeedKind::kPrefill);
  std::vector<StepCommand> in_flight = Of<StepCommand>(scheduler.Plan());
  scheduler.Feed(3, 640, FeedKind::kPrefill);
  int steps = 0;
  for (int left = 640; left > 0; ++steps) {
    scheduler.OnStepDone(in_flight.front().step_id);
    in_flight.erase(in_flight.begin());
    for (const StepCommand& step : Of<StepCommand>(scheduler.Plan())) {
      in_flight.push_back(step);
      EXPECT_EQ(Rows(step), 64);
      for (const StepCommand::Entry& entry : step.entries) left -= entry.sequence == 3 ? entry.tokens : 0;
    }
    ASSERT_LT(steps, 25) << "half of the rows are its";
  }
}

}  // namespace
}  // namespace rwkv::router
