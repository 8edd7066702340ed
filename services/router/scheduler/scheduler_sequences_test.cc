// Sequences that come and go: before they are attached, warm ones, what those that leave take along, tenants' weights.
#include <map>
#include <string>
#include <variant>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/router/scheduler/scheduler.h"
#include "services/router/scheduler/scheduler_testing.h"

namespace rwkv::router {
namespace {

using ::testing::IsEmpty;
using ::testing::SizeIs;
using FeedKind = Scheduler::FeedKind;

// Plans `rounds` times, every step coming back at once. Rows by sequence.
std::map<SequenceId, int> Serve(Scheduler& scheduler, int rounds) {
  std::map<SequenceId, int> rows;
  for (int i = 0; i < rounds; ++i) {
    for (const StepCommand& step : Of<StepCommand>(scheduler.Plan())) {
      for (const StepCommand::Entry& entry : step.entries) rows[entry.sequence] += entry.tokens;
      scheduler.OnStepDone(step.step_id);
    }
  }
  return rows;
}

void Attach(Scheduler& scheduler, SequenceId id, absl::string_view tenant = "", double weight = 1) {
  ASSERT_TRUE(scheduler.Admit(id, 0, tenant, weight));
  Serve(scheduler, 1);
  scheduler.OnAttached(id);
}

TEST(SchedulerSequencesTest, OneThatWaitsForASlotIsNotAttachedWhateverIsSaid) {
  Scheduler scheduler(SchedulerOptions(1, 1, 8));
  ASSERT_TRUE(scheduler.Admit(1, 0));
  scheduler.OnAttached(1);
  EXPECT_FALSE(scheduler.Save(1).has_value());
}

TEST(SchedulerSequencesTest, NothingIsAskedOfOneThatIsNotAttached) {
  Scheduler scheduler(SchedulerOptions(1, 1, 8));
  ASSERT_TRUE(scheduler.Admit(1, 0));
  scheduler.Plan();
  scheduler.GoOn(1, 10);
  scheduler.Halt(1);
  EXPECT_FALSE(scheduler.Save(1).has_value());
  EXPECT_THAT(scheduler.Plan(), IsEmpty());
  EXPECT_FALSE(scheduler.Retire(1, "session", "branch").has_value());
  EXPECT_FALSE(scheduler.FindWarm("session", "branch", 100).has_value());
  const std::vector<Command> commands = scheduler.Plan();
  ASSERT_THAT(commands, SizeIs(1));
  EXPECT_EQ(std::get<ReleaseCommand>(commands[0]).sequence, 1);
}

TEST(SchedulerSequencesTest, OfTwoWarmSlotsOfABranchTheFurtherOneIsFound) {
  Scheduler scheduler(SchedulerOptions(1, 2, 16));
  const int tokens[] = {9, 4};
  for (SequenceId id = 1; id <= 2; ++id) {
    Attach(scheduler, id);
    scheduler.Feed(id, tokens[id - 1], FeedKind::kPrefill);
    Serve(scheduler, 2);
    ASSERT_EQ(scheduler.Retire(id, "session", "branch"), tokens[id - 1]);
  }
  EXPECT_EQ(scheduler.FindWarm("session", "branch", 100)->sequence, 1);
  EXPECT_EQ(scheduler.FindWarm("session", "branch", 8)->sequence, 2);
  EXPECT_EQ(scheduler.slots_in_use(), 0);
  EXPECT_EQ(scheduler.slots_warm(), 2);
  ASSERT_TRUE(scheduler.AdmitWarm(3, 1));
  EXPECT_EQ(scheduler.slots_in_use(), 1);
}

TEST(SchedulerSequencesTest, WhoWaitsForTokensIsNoDecoderOfTheBatch) {
  Scheduler scheduler(SchedulerOptions(1, 6, 16));
  for (SequenceId id = 1; id <= 6; ++id) Attach(scheduler, id);
  for (SequenceId id = 1; id <= 2; ++id) scheduler.Feed(id, 1, FeedKind::kDecode);
  const std::vector<StepCommand> steps = Of<StepCommand>(scheduler.Plan());
  ASSERT_THAT(steps, SizeIs(2));
  EXPECT_THAT(steps[0].entries, SizeIs(1));
}

// What a sequence had left to feed is no work of its tenant's any more, or nobody who comes would begin beside the
// others, but where that tenant stood.
TEST(SchedulerSequencesTest, WorkThatLeavesWithItsSequenceIsNobodys) {
  for (const bool retires : {false, true}) {
    Scheduler scheduler(SchedulerOptions(1, 4, 1));
    Attach(scheduler, 1, "gone");
    Attach(scheduler, 2, "busy");
    scheduler.Feed(1, 100, FeedKind::kPrefill);
    if (retires) {
      scheduler.Retire(1, "session", "branch");
    } else {
      scheduler.Cancel(1);
    }
    scheduler.Feed(2, 100, FeedKind::kPrefill);
    Serve(scheduler, 20);
    Attach(scheduler, 3, "new");
    scheduler.Feed(3, 100, FeedKind::kPrefill);
    std::map<SequenceId, int> rows = Serve(scheduler, 5);
    EXPECT_EQ(rows[2] + rows[3], 10);
    EXPECT_NEAR(rows[2], rows[3], 2) << (retires ? "retired" : "cancelled");
  }
}

TEST(SchedulerSequencesTest, RowsAreSharedByWeightAlsoInWarmSlots) {
  Scheduler scheduler(SchedulerOptions(1, 2, 1));
  Attach(scheduler, 1, "heavy", 3);
  Attach(scheduler, 2, "light", 1);
  scheduler.Feed(1, 1000, FeedKind::kPrefill);
  scheduler.Feed(2, 1000, FeedKind::kPrefill);
  std::map<SequenceId, int> rows = Serve(scheduler, 40);
  EXPECT_NEAR(rows[1], 3 * rows[2], 6);
  ASSERT_TRUE(scheduler.Retire(1, "session", "branch").has_value());
  ASSERT_TRUE(scheduler.AdmitWarm(3, 1, "heavy", 3));
  scheduler.OnAttached(3);
  scheduler.Feed(3, 1000, FeedKind::kPrefill);
  rows = Serve(scheduler, 40);
  EXPECT_NEAR(rows[3], 3 * rows[2], 6);
}

}  // namespace
}  // namespace rwkv::router
