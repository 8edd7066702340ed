// Epochs, the order of commands, routers, draining, metrics.
#include "services/worker/engine/stage_runner.h"

#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "prometheus/histogram.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/client/worker_client.h"
#include "services/worker/engine/router_registry.h"
#include "services/worker/engine/worker_metrics.h"
#include "services/worker/link/link.h"
#include "services/worker/testing/pipeline_driver.h"
#include "services/worker/testing/runner_fixture.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

using StageRunnerTest = RunnerFixture;

TEST_P(StageRunnerTest, InProcessLinksGiveTheBitsOfOneStage) {
  EnginePipeline twin(path_, 1);
  ASSERT_THAT(twin.AttachFresh(0, 1), IsOk());
  const absl::StatusOr<StepOutput> expected = twin.Feed(0, 1, 0, tokens_);
  ASSERT_THAT(expected, IsOk());
  for (int stages : {1, 2, 3}) {
    SCOPED_TRACE(stages);
    clients_.clear();
    stages_.clear();
    Start(stages);
    PipelineDriver driver(clients_);
    ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
    ASSERT_THAT(driver.AttachFresh(2, 9), IsOk());
    const absl::StatusOr<DrivenStep> step = driver.Feed(2, 9, 0, tokens_);
    ASSERT_THAT(step, IsOk());
    EXPECT_EQ(step->logits.at(9), LogitsOf(*expected, 1));
  }
}

TEST_P(StageRunnerTest, ABlockedReceiveWakesUpWhenTheEpochEnds) {
  Start(2);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
  // Only the second stage gets the step: it waits for the first.
  v1::ExecuteRequest request;
  request.mutable_step()->set_step_id(1);
  ASSERT_THAT(driver.stream(1).Write(request), IsOk());
  driver.stream(1).Cancel();
  EXPECT_TRUE(stages_[1].runner->WaitUntilIdle(absl::Now() + absl::Seconds(10)));
  // And the first notices with its next step, perhaps before Write returns.
  (void)driver.stream(0).Write(request);
  EXPECT_THAT(driver.stream(0).Read().status(), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_EQ(stages_[0].worker_metrics->link_errors.Value(), 1);
  EXPECT_EQ(stages_[1].worker_metrics->link_errors.Value(), 0) << "its epoch had ended";
}

TEST_P(StageRunnerTest, AnIdleStageHearsThatTheOneBeforeHasGone) {
  Start(2);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
  driver.stream(0).Cancel();
  ASSERT_TRUE(stages_[1].runner->WaitUntilIdle(absl::Now() + absl::Seconds(30)));
  EXPECT_THAT(driver.stream(1).Read().status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("is gone")));
}

// A stage that waits for its next input has sent what it had.
TEST_P(StageRunnerTest, ResultsLeaveBeforeTheNextInputIsWaitedFor) {
  Start(2);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  for (uint64_t id : {1, 2}) {
    v1::ExecuteRequest request;
    request.mutable_step()->set_step_id(id);
    *request.mutable_step()->add_entries() = Entry(0, 1, id - 1, {4}, false);
    ASSERT_THAT(driver.stream(1).Write(request), IsOk());
    if (id == 1) ASSERT_THAT(driver.stream(0).Write(request), IsOk());
  }
  const absl::StatusOr<v1::ExecuteResponse> first = driver.stream(1).Read();
  ASSERT_THAT(first, IsOk());
  EXPECT_EQ(first->step().step_id(), 1u);
}

TEST_P(StageRunnerTest, ManyCommandsWaitTheirTurn) {
  if (protects_memory()) GTEST_SKIP() << "slow, and other tests touch the same memory";
  Start(2);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  // More than the queues hold: Write waits for room.
  constexpr int kSteps = 3 * Epoch::kMaxCommands;
  for (int i = 0; i < kSteps; ++i) {
    v1::Step step;
    *step.add_entries() = Entry(0, 1, i, {static_cast<uint32_t>(i % 67)}, false);
    ASSERT_THAT(driver.WriteStep(std::move(step)), IsOk());
  }
  for (int i = 0; i < kSteps; ++i) {
    const absl::StatusOr<DrivenStep> step = driver.ReadStep();
    ASSERT_THAT(step, IsOk());
    ASSERT_EQ(step->result.step_id(), i + 1u);
    ASSERT_EQ(step->result.entries(0).position(), i + 1u);
  }
}

// The router ends the epoch as soon as its turns have left it.
TEST_P(StageRunnerTest, DrainWaitsForTheRouterToLeave) {
  Start(1);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  const absl::Time begin = absl::Now();
  std::thread drain([&] { stages_[0].runner->Drain(begin + absl::Minutes(10)); });
  while (!stages_[0].runner->draining() && absl::Now() < begin + absl::Seconds(30)) std::this_thread::yield();
  EXPECT_THAT(driver.Feed(0, 1, 0, tokens_), IsOk()) << "what runs goes on";
  driver.Close();
  drain.join();
  EXPECT_LT(absl::Now() - begin, absl::Minutes(4));
}

TEST_P(StageRunnerTest, AStepThatIsNotTheNextEndsTheEpoch) {
  Start(1);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
  v1::ExecuteRequest request;
  request.mutable_step()->set_step_id(2);
  *request.mutable_step()->add_entries() = Entry(0, 1, 0, {4}, false);
  ASSERT_THAT(driver.WriteAll(request), IsOk());
  EXPECT_THAT(driver.stream(0).Read().status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("step 2 after step 0")));
}

TEST_P(StageRunnerTest, AUselessCommandEndsTheEpoch) {
  Start(1);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
  ASSERT_THAT(driver.WriteAll(v1::ExecuteRequest()), IsOk());
  EXPECT_THAT(driver.stream(0).Read().status(), StatusIs(absl::StatusCode::kInvalidArgument));
}

// Where a stage is in a pipeline, and whether there is a next one, follows from its layers.
TEST_P(StageRunnerTest, AnEpochThatDoesNotFitTheStageIsRefused) {
  Start(3);
  const auto plan = [](const std::string& router, const std::string& epoch, int index, int count,
                       const std::string& next) {
    v1::OpenEpoch open;
    open.set_router(router);
    open.set_epoch(epoch);
    open.set_stage_index(index);
    open.set_stage_count(count);
    open.set_next_address(next);
    return open;
  };
  constexpr auto kNameless = absl::StatusCode::kInvalidArgument;
  constexpr auto kUnfit = absl::StatusCode::kFailedPrecondition;
  struct Row {
    const char* name;
    int stage;
    v1::OpenEpoch open;
    absl::StatusCode code;
    const char* says;
  };
  for (const Row& row : std::vector<Row>{
           {"no router", 1, plan("", "e", 1, 3, "stage-2"), kNameless, "router and epoch must be named"},
           {"no epoch", 1, plan("r", "", 1, 3, "stage-2"), kNameless, "router and epoch must be named"},
           {"below the first", 1, plan("r", "e", -1, 3, "stage-2"), kUnfit, "stage -1 of 3 does not fit layers"},
           {"beyond the last", 1, plan("r", "e", 3, 3, "stage-2"), kUnfit, "stage 3 of 3 does not fit layers"},
           {"called the first", 1, plan("r", "e", 0, 3, "stage-2"), kUnfit, "stage 0 of 3 does not fit layers"},
           {"called the last", 1, plan("r", "e", 1, 2, ""), kUnfit, "stage 1 of 2 does not fit layers"},
           {"no first", 0, plan("r", "e", 1, 3, "stage-1"), kUnfit, "stage 1 of 3 does not fit layers"},
           {"no last", 2, plan("r", "e", 2, 4, "stage-3"), kUnfit, "stage 2 of 4 does not fit layers"},
           {"no next one", 1, plan("r", "e", 1, 3, ""), kUnfit, "with next address ''"},
           {"one after the last", 2, plan("r", "e", 2, 3, "stage-3"), kUnfit, "with next address 'stage-3'"}}) {
    SCOPED_TRACE(row.name);
    const std::unique_ptr<ExecuteStream> stream = clients_[row.stage]->Execute();
    v1::ExecuteRequest request;
    *request.mutable_open() = row.open;
    EXPECT_THAT(stream->Write(request), StatusIs(row.code, HasSubstr(row.says)));
  }
  PipelineDriver driver(clients_);
  EXPECT_THAT(driver.Open("r", "e"), IsOk());
}

TEST_P(StageRunnerTest, ARunnerThatGoesEndsItsEpoch) {
  Start(1);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
  stages_[0].runner.reset();
  EXPECT_THAT(driver.stream(0).Read().status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("shuts down")));
}

TEST_P(StageRunnerTest, AnEpochHasOneStreamAndAWorkerOneRouter) {
  Start(1);
  PipelineDriver driver(clients_), twice(clients_), foreign(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
  EXPECT_THAT(twice.Open("router-0", "e1"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("e1 is open already")));
  EXPECT_THAT(foreign.Open("router-1", "e2"), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("router-0 drives")));
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  EXPECT_THAT(driver.Feed(0, 1, 0, tokens_), IsOk()) << "neither did it any harm";
}

TEST_P(StageRunnerTest, ARouterThatFellSilentLosesTheWorkerToOneThatAsks) {
  Start(1);
  v1::RouterAnnouncement router;
  router.set_name("router-0");
  routers_.Heard(router);
  PipelineDriver silent(clients_), early(clients_), late(clients_);
  ASSERT_THAT(silent.Open("router-0", "e1"), IsOk());
  clock_.Advance(RouterRegistry::kSilence);
  EXPECT_THAT(early.Open("router-1", "e2"), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("router-0 drives")));
  clock_.Advance(absl::Milliseconds(1));
  ASSERT_THAT(late.Open("router-1", "e3"), IsOk());
  EXPECT_EQ(stages_[0].runner->driver().router, "router-1");
  EXPECT_EQ(stages_[0].runner->driver().epoch, "e3");
  EXPECT_THAT(silent.stream(0).Read().status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("e3 took over")));
  ASSERT_THAT(late.AttachFresh(0, 1), IsOk());
  EXPECT_THAT(late.Feed(0, 1, 0, tokens_), IsOk());
}

TEST_P(StageRunnerTest, MetricsSayWhatHappened) {
  Start(2);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1", "store"), IsOk());
  for (int slot : {0, 1, 2}) ASSERT_THAT(driver.AttachFresh(slot, slot + 1), IsOk());
  ASSERT_THAT(driver.Feed(0, 1, 0, tokens_), IsOk());
  ASSERT_THAT(driver.Feed(0, 1, tokens_.size(), {1}), IsOk());
  v1::Step step;
  *step.add_entries() = Entry(1, 2, 0, {1, 2});
  *step.add_entries() = Entry(2, 9, 0, {1, 2, 3});  // Another's.
  *step.add_entries() = Entry(0, 1, 0, {1});        // Elsewhere.
  ASSERT_THAT(driver.Step(std::move(step)), IsOk());
  const WorkerMetrics& first = *stages_[0].worker_metrics;
  const WorkerMetrics& last = *stages_[1].worker_metrics;
  for (const WorkerMetrics* metrics : {&first, &last}) {
    EXPECT_EQ(metrics->slots.Value(), 8);
    EXPECT_EQ(metrics->slots_used.Value(), 3);
    EXPECT_EQ(metrics->epochs.Value(), 1);
    EXPECT_EQ(metrics->tokens.Value(), tokens_.size() + 1 + 2) << "without padding";
  }
  EXPECT_GT(first.state_bytes.Value(), 0);
  const auto count = [](const prometheus::Histogram& histogram) { return histogram.Collect().histogram.sample_count; };
  for (const WorkerMetrics* metrics : {&first, &last}) {
    EXPECT_EQ(count(metrics->prefill_step_seconds), 2) << "steps with an entry of several tokens";
    EXPECT_EQ(count(metrics->decode_step_seconds), 1);
    EXPECT_EQ(count(metrics->batch_rows), 3);
  }
  EXPECT_EQ(count(first.receive_wait_seconds), 0) << "nobody is before it";
  EXPECT_EQ(count(last.receive_wait_seconds), 3);
  // x and v_first of every row that somebody computed.
  const LinkShape shape = stages_[0].engine->link_shape();
  const auto row_bytes = static_cast<double>(shape.width + shape.v_first_width) * sizeof(float);
  EXPECT_EQ(first.link_sent_bytes.Value(), static_cast<double>(tokens_.size() + 1 + 2) * row_bytes);
  EXPECT_EQ(last.link_sent_bytes.Value(), 0);
  const auto refused = [](const WorkerMetrics& metrics, RefusalCause cause) {
    return metrics.refused_entries[static_cast<int>(cause)]->Value();
  };
  EXPECT_EQ(refused(first, RefusalCause::kSequence), 1);
  EXPECT_EQ(refused(first, RefusalCause::kPosition), 1);
  EXPECT_EQ(refused(last, RefusalCause::kSequence), 0) << "the first has said it";
  EXPECT_EQ(refused(last, RefusalCause::kPosition), 0);

  driver.Close();
  for (Stage& stage : stages_) {
    ASSERT_TRUE(stage.runner->WaitUntilIdle(absl::Now() + absl::Seconds(30))) << "the epoch has ended";
    EXPECT_EQ(stage.worker_metrics->slots_used.Value(), 0) << "an epoch's slots end with it";
  }
  EXPECT_EQ(count(first.send_wait_seconds), 3);
}

INSTANTIATE_TEST_SUITE_P(Devices, StageRunnerTest, ::testing::Values("auto", kLazyDevice, kProtectedDevice),
                         [](const ::testing::TestParamInfo<const char*>& info) { return std::string(info.param); });

}  // namespace
}  // namespace rwkv::worker
