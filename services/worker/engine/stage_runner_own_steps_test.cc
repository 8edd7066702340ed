// Sequences that decode by themselves.
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/metrics.h"
#include "services/common/tracing/tracer.h"
#include "services/worker/engine/stage_runner.h"
#include "services/worker/engine/worker_metrics.h"
#include "services/worker/testing/pipeline_driver.h"
#include "services/worker/testing/runner_fixture.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/span_collector.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;

class StageRunnerOwnStepsTest : public RunnerFixture {
 protected:
  void ExpectGoesOnByItself(int stages) {
    Start(stages);
    PipelineDriver driver(clients_);
    ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
    ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
    const size_t tokens = protects_memory() ? 8 : 20;  // Lifting its protection takes a hundred times a step.
    std::vector<uint32_t> asked;
    uint64_t position = 0;
    for (std::vector<uint32_t> fed = tokens_; asked.size() < tokens; fed = {asked.back()}) {
      const absl::StatusOr<DrivenStep> step = driver.Feed(0, 1, position, fed, false, true);
      ASSERT_THAT(step, IsOk());
      asked.push_back(step->result.entries(0).token_id());
      position += fed.size();
    }

    ASSERT_THAT(driver.Open("router-0", "e2"), IsOk());
    ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
    ASSERT_THAT(driver.AttachFresh(1, 2), IsOk());
    v1::Step first;
    *first.add_entries() = Entry(0, 1, 0, tokens_);
    first.mutable_entries(0)->set_sample(true);
    first.mutable_entries(0)->set_go_on_until(tokens_.size() + 4);
    ASSERT_THAT(driver.WriteStep(std::move(first)), IsOk());
    v1::Step beside;
    *beside.add_entries() = Entry(1, 2, 0, tokens_);
    ASSERT_THAT(driver.WriteStep(std::move(beside)), IsOk());
    v1::ExecuteRequest go_on;
    go_on.mutable_go_on()->set_sequence(1);
    go_on.mutable_go_on()->set_until(position);
    ASSERT_THAT(driver.WriteAll(go_on), IsOk());

    std::vector<uint32_t> drawn;
    std::vector<uint64_t> steps_of_the_router;
    while (drawn.size() < tokens || steps_of_the_router.size() < 2) {
      const absl::StatusOr<v1::ExecuteResponse> response = driver.stream(stages - 1).Read();
      ASSERT_THAT(response, IsOk());
      if (response->step().step_id() > 0) steps_of_the_router.push_back(response->step().step_id());
      for (const v1::EntryResult& entry : response->step().entries()) {
        ASSERT_EQ(entry.status().code(), 0) << entry.status().message();
        if (entry.sequence() == 2) continue;
        EXPECT_EQ(entry.position(), tokens_.size() + drawn.size());
        drawn.push_back(entry.token_id());
      }
    }
    EXPECT_EQ(drawn, asked);
    EXPECT_EQ(steps_of_the_router, (std::vector<uint64_t>{1, 2}));
    go_on.mutable_go_on()->set_until(0);
    ASSERT_THAT(driver.WriteAll(go_on), IsOk());
    const absl::StatusOr<v1::ExecuteResponse> stopped = driver.stream(0).Read();
    ASSERT_THAT(stopped, IsOk());
    EXPECT_EQ(stopped->stopped().sequence(), 1u);
    EXPECT_EQ(stopped->stopped().position(), position) << "it went too far";
  }

  // Tokens of a sequence that goes on by itself beside 30 steps of the router's.
  struct Beside {
    int with = 0;     // In results of the router's steps,
    int between = 0;  // and of others.
  };
  Beside RunBeside(int stages, size_t rows) {
    Beside beside;
    Start(stages);
    PipelineDriver driver(clients_);
    EXPECT_THAT(driver.Open("router-0", "e1"), IsOk());
    for (int slot : {0, 1}) {
      v1::AttachSequence attach;
      attach.set_slot(slot);
      attach.set_sequence(slot + 1);
      attach.set_fresh(true);
      if (slot == 0) attach.set_trace_parent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
      EXPECT_THAT(driver.Attach(attach), IsOk());
    }
    v1::Step first;
    *first.add_entries() = Entry(0, 1, 0, tokens_);
    first.mutable_entries(0)->set_sample(true);
    first.mutable_entries(0)->set_go_on_until(tokens_.size() + 1000);
    EXPECT_THAT(driver.WriteStep(std::move(first)), IsOk());
    constexpr uint64_t kSteps = 30;
    for (uint64_t i = 0; i < kSteps; ++i) {
      v1::Step step;
      *step.add_entries() = Entry(1, 2, i * rows, std::vector<uint32_t>(rows, 4), false);
      EXPECT_THAT(driver.WriteStep(std::move(step)), IsOk());
    }
    uint64_t position = tokens_.size();
    for (uint64_t last = 0; last < 1 + kSteps;) {
      const absl::StatusOr<v1::ExecuteResponse> response = driver.stream(stages - 1).Read();
      EXPECT_THAT(response, IsOk());
      if (!response.ok()) return beside;
      const v1::StepResult& result = response->step();
      if (result.step_id() != 0) EXPECT_EQ(result.step_id(), ++last) << "each step of the router's is answered, once";
      for (const v1::EntryResult& entry : result.entries()) {
        EXPECT_EQ(entry.status().code(), 0) << entry.status().message();
        if (entry.sequence() != 1) continue;
        EXPECT_EQ(entry.position(), position++);
        if (result.step_id() > 1) ++beside.with;
        if (result.step_id() == 0) ++beside.between;
      }
    }
    return beside;
  }
};

TEST_P(StageRunnerOwnStepsTest, ASequenceGoesOnByItselfWithTheTokensItIsAskedFor) { ExpectGoesOnByItself(1); }

TEST_P(StageRunnerOwnStepsTest, OfThreeStagesItGoesOnByItselfToo) { ExpectGoesOnByItself(3); }

TEST_P(StageRunnerOwnStepsTest, TheyGoAlongWithTheRoutersSteps) {
  if (protects_memory()) GTEST_SKIP() << "slow, and other tests touch the same memory";
  const Beside beside = RunBeside(1, 1);
  EXPECT_GE(beside.with, 10) << "the weights were read for each of them anew; between: " << beside.between;
}

// In whatever steps they are.
TEST_P(StageRunnerOwnStepsTest, TheirTokensAreOneSpan) {
  if (protects_memory()) GTEST_SKIP() << "slow, and other tests touch the same memory";
  rwkv::testing::SpanCollector collector;
  const std::unique_ptr<common::Metrics> metrics = *common::Metrics::Create("");
  common::Tracer::Options options;
  options.endpoint = collector.address();
  options.flush_timeout = absl::Seconds(30);
  std::unique_ptr<common::Tracer> tracer = *common::Tracer::Create(options, metrics.get());
  options_.tracer = tracer.get();
  EXPECT_GE(RunBeside(1, 1).with, 10);
  stages_.clear();  // Spans end.
  tracer = nullptr;
  std::map<std::string, int> spans;
  for (const auto& one : collector.spans()) ++spans[one.span.name()];
  EXPECT_EQ(spans, (std::map<std::string, int>{{"worker.attach", 1}, {"worker.prefill", 1}, {"worker.lease", 1}}));
}

TEST_P(StageRunnerOwnStepsTest, TheyTakeTurnsWithStepsThatHaveNoRoom) {
  if (protects_memory()) GTEST_SKIP() << "slow, and other tests touch the same memory";
  engine_options_.max_batch_tokens = static_cast<int>(tokens_.size());
  const Beside beside = RunBeside(1, engine_options_.max_batch_tokens);
  EXPECT_EQ(beside.with, 0);
  EXPECT_GE(beside.between, 5) << "the router's waited, and went first every time";
}

TEST_P(StageRunnerOwnStepsTest, OfTwoStagesTheyHaveStepsOfTheirOwn) {
  if (protects_memory()) GTEST_SKIP() << "slow, and other tests touch the same memory";
  EXPECT_EQ(RunBeside(2, 1).with, 0) << "the second stage knows of the router's entries alone";
}

// What the router says comes to each stage by a stream of its own, and one may be late.
TEST_P(StageRunnerOwnStepsTest, ALaterStageFollowsTheOrderOfTheFirst) {
  Start(2);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1", "store"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  const uint64_t position = tokens_.size();
  v1::Step first;
  *first.add_entries() = Entry(0, 1, 0, tokens_);
  first.mutable_entries(0)->set_sample(true);
  first.mutable_entries(0)->set_go_on_until(position);
  ASSERT_THAT(driver.Step(std::move(first)), IsOk());
  const v1::ExecuteRequest save = SaveOf(0, 1, position, "snap");
  v1::ExecuteRequest go_on;
  go_on.mutable_go_on()->set_sequence(1);
  go_on.mutable_go_on()->set_until(position + 3);
  const double tokens = stages_[1].worker_metrics->tokens.Value();
  const int64_t frames = network_.FramesSent("stage-1");
  for (const v1::ExecuteRequest& request : {save, go_on}) ASSERT_THAT(driver.stream(0).Write(request), IsOk());
  ASSERT_TRUE(network_.WaitForFrames("stage-1", frames + 1, absl::Seconds(30))) << "the first goes ahead";
  EXPECT_EQ(stages_[1].worker_metrics->tokens.Value(), tokens) << "it has not saved yet";
  for (const v1::ExecuteRequest& request : {save, go_on}) ASSERT_THAT(driver.stream(1).Write(request), IsOk());
  int results = 0, saves = 0;
  while (results < 3 || saves < 1) {
    const absl::StatusOr<v1::ExecuteResponse> response = driver.stream(1).Read();
    ASSERT_THAT(response, IsOk());
    EXPECT_EQ(response->saved().status().code(), 0) << response->saved().status().message();
    saves += response->has_saved();
    results += response->step().entries_size();
  }
}

TEST_P(StageRunnerOwnStepsTest, TheyEndWithTheirEpoch) {
  Start(1);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  v1::Step first;
  *first.add_entries() = Entry(0, 1, 0, tokens_);
  first.mutable_entries(0)->set_sample(true);
  ASSERT_THAT(driver.WriteStep(std::move(first)), IsOk());
  ASSERT_THAT(driver.stream(0).Read(), IsOk());  // It could go on from here.
  ASSERT_THAT(driver.Open("router-0", "e2"), IsOk());
  v1::ExecuteRequest go_on;
  go_on.mutable_go_on()->set_sequence(1);
  go_on.mutable_go_on()->set_until(1000);
  ASSERT_THAT(driver.stream(0).Write(go_on), IsOk());
  ASSERT_THAT(driver.AttachFresh(1, 2), IsOk());
  for (uint64_t i = 0; i < 3; ++i) EXPECT_THAT(driver.Feed(1, 2, i, {4}), IsOk()) << "nothing else comes";
}

TEST_P(StageRunnerOwnStepsTest, AnAttachThatFailsLeavesTheSlotsSequenceAlone) {
  Start(1);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  ASSERT_THAT(driver.Feed(0, 1, 0, tokens_, false, true), IsOk());
  v1::AttachSequence attach;
  attach.set_sequence(2);
  attach.set_fresh(true);
  attach.set_initial_state("nobody's");
  EXPECT_FALSE(driver.Attach(attach).ok());
  v1::ExecuteRequest stop;
  stop.mutable_go_on()->set_sequence(1);
  ASSERT_THAT(driver.WriteAll(stop), IsOk());
  attach.set_slot(1);
  v1::ExecuteRequest again;
  *again.mutable_attach() = attach;
  ASSERT_THAT(driver.WriteAll(again), IsOk());
  const absl::StatusOr<v1::ExecuteResponse> stopped = driver.stream(0).Read();
  ASSERT_THAT(stopped, IsOk());
  EXPECT_EQ(stopped->stopped().sequence(), 1u);
  EXPECT_EQ(stopped->stopped().position(), tokens_.size());
}

// It is refused, and whoever has the slot by then is not touched.
TEST_P(StageRunnerOwnStepsTest, WhatAnotherSequenceDrewMovesNobody) {
  Start(2);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  v1::Step first;
  *first.add_entries() = Entry(0, 1, 0, tokens_);
  first.mutable_entries(0)->set_sample(true);
  first.mutable_entries(0)->set_go_on_until(tokens_.size() + 1000);
  ASSERT_THAT(driver.WriteStep(std::move(first)), IsOk());
  for (int i = 0; i < 5; ++i) ASSERT_THAT(driver.stream(1).Read(), IsOk());
  // The later stage hears of it first: steps of the old one are on their way to it.
  v1::ExecuteRequest release, attach;
  release.mutable_release()->set_sequence(1);
  attach.mutable_attach()->set_sequence(2);
  attach.mutable_attach()->set_fresh(true);
  for (int stage : {1, 0}) {
    for (const v1::ExecuteRequest& request : {release, attach})
      ASSERT_THAT(driver.stream(stage).Write(request), IsOk());
  }
  const absl::StatusOr<v1::ExecuteResponse> attached = driver.stream(0).Read();
  ASSERT_THAT(attached, IsOk());
  EXPECT_EQ(attached->attached().sequence(), 2u);
  v1::Step next;
  *next.add_entries() = Entry(0, 2, 0, tokens_);
  next.mutable_entries(0)->set_sample(true);
  ASSERT_THAT(driver.WriteStep(std::move(next)), IsOk());
  absl::optional<v1::EntryResult> drawn;
  while (!drawn.has_value()) {
    const absl::StatusOr<v1::ExecuteResponse> response = driver.stream(1).Read();
    ASSERT_THAT(response, IsOk());
    if (response->step().step_id() == 2) drawn = response->step().entries(0);
  }
  EXPECT_EQ(drawn->status().code(), 0) << drawn->status().message();
  EXPECT_EQ(drawn->position(), tokens_.size());
  driver.Close();

  PipelineDriver alone(clients_);
  ASSERT_THAT(alone.Open("router-0", "e2"), IsOk());
  ASSERT_THAT(alone.AttachFresh(0, 1), IsOk());
  const absl::StatusOr<DrivenStep> step = alone.Feed(0, 1, 0, tokens_, false, true);
  ASSERT_THAT(step, IsOk());
  EXPECT_EQ(drawn->token_id(), step->result.entries(0).token_id());
}

INSTANTIATE_TEST_SUITE_P(Devices, StageRunnerOwnStepsTest, ::testing::Values("auto", kLazyDevice, kProtectedDevice),
                         [](const ::testing::TestParamInfo<const char*>& info) { return std::string(info.param); });

}  // namespace
}  // namespace rwkv::worker
