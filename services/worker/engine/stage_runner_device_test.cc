// A device that faults, hangs or has no memory, and what drains where something hangs.
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/client/worker_client.h"
#include "services/worker/engine/stage_runner.h"
#include "services/worker/engine/worker_metrics.h"
#include "services/worker/testing/faulty_runner_fixture.h"
#include "services/worker/testing/pipeline_driver.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class StageRunnerDeviceTest : public FaultyRunnerFixture {
 protected:
  StageRunnerDeviceTest() {
    options_.on_device_lost = [this](const absl::Status& why) {
      absl::MutexLock lock(&mu_);
      lost_.push_back(why);
    };
  }
  ~StageRunnerDeviceTest() override {
    faults_.GoOn();
    stages_.clear();  // They tell of the device until they are gone.
  }

  std::vector<absl::Status> lost() {
    absl::MutexLock lock(&mu_);
    return lost_;
  }

  // One stage, and a sequence in slot 0.
  void StartWithASequence(PipelineDriver& driver) {
    ASSERT_THAT(driver.Open("router-0", "e1", "store"), IsOk());
    ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  }
  void StartWithAStepThatHangs(PipelineDriver& driver) {
    StartWithASequence(driver);
    faults_.Hang();
    ASSERT_THAT(WriteStep(driver), IsOk());
    faults_.WaitForWaiting();
  }
  // Epoch e2, which waits for e1.
  std::unique_ptr<ExecuteStream> OpenNext(const std::string& router = "router-0") {
    std::unique_ptr<ExecuteStream> stream = clients_[0]->Execute();
    v1::ExecuteRequest open;
    open.mutable_open()->set_router(router);
    open.mutable_open()->set_epoch("e2");
    open.mutable_open()->set_stage_count(1);
    EXPECT_THAT(stream->Write(open), IsOk());
    return stream;
  }
  absl::Status WriteStep(PipelineDriver& driver) {
    v1::Step step;
    *step.add_entries() = Entry(0, 1, 0, tokens_);
    return driver.WriteStep(std::move(step));
  }

  absl::Mutex mu_;
  std::vector<absl::Status> lost_ ABSL_GUARDED_BY(mu_);
};

TEST_P(StageRunnerDeviceTest, AFaultInAStepEndsTheEpochAndIsTold) {
  Start(1);
  PipelineDriver driver(clients_);
  StartWithASequence(driver);
  faults_.FaultWith(absl::InternalError("cudaErrorIllegalAddress"));
  EXPECT_THAT(driver.Feed(0, 1, 0, tokens_).status(),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("step 1: cudaErrorIllegalAddress")));
  ASSERT_TRUE(IsIdleSoon());
  EXPECT_THAT(lost(), ElementsAre(StatusIs(absl::StatusCode::kInternal, HasSubstr("cudaErrorIllegalAddress"))));
  EXPECT_EQ(stages_[0].worker_metrics->step_errors.Value(), 1);
  EXPECT_EQ(stages_[0].worker_metrics->tokens.Value(), 0);
}

// A worker whose GPU is lost while nothing runs must not go on to refuse what it is asked.
TEST_P(StageRunnerDeviceTest, AFaultInAnAttachEndsTheEpochAndIsTold) {
  Start(1);
  PipelineDriver driver(clients_);
  StartWithASequence(driver);
  faults_.FaultWith(absl::InternalError("cudaErrorECCUncorrectable"));
  const auto is_fault = StatusIs(absl::StatusCode::kInternal, HasSubstr("cudaErrorECCUncorrectable"));
  EXPECT_THAT(driver.AttachFresh(1, 2), is_fault);
  ASSERT_TRUE(IsIdleSoon()) << "the epoch goes on";
  EXPECT_THAT(lost(), ElementsAre(is_fault));
}

TEST_P(StageRunnerDeviceTest, AFaultInASaveEndsTheEpochAndIsTold) {
  Start(1);
  PipelineDriver driver(clients_);
  StartWithASequence(driver);
  faults_.FaultWith(absl::InternalError("cudaErrorECCUncorrectable"));
  const auto is_fault = StatusIs(absl::StatusCode::kInternal, HasSubstr("cudaErrorECCUncorrectable"));
  EXPECT_THAT(driver.Save(0, 1, 0, "first", kTestFingerprint).status(), is_fault);
  ASSERT_TRUE(IsIdleSoon()) << "the epoch goes on";
  EXPECT_THAT(lost(), ElementsAre(is_fault));
}

TEST_P(StageRunnerDeviceTest, AFaultInALoadEndsTheEpochAndIsTold) {
  Start(1);
  PipelineDriver driver(clients_);
  StartWithASequence(driver);
  const absl::StatusOr<v1::SnapshotManifest> manifest = driver.Save(0, 1, 0, "first", kTestFingerprint);
  ASSERT_THAT(manifest, IsOk());
  faults_.FaultWith(absl::InternalError("cudaErrorECCUncorrectable"));
  const auto is_fault = StatusIs(absl::StatusCode::kInternal, HasSubstr("cudaErrorECCUncorrectable"));
  v1::AttachSequence attach;
  attach.set_slot(1);
  attach.set_sequence(2);
  *attach.mutable_snapshot() = *manifest;
  EXPECT_THAT(driver.Attach(attach), is_fault);
  ASSERT_TRUE(IsIdleSoon()) << "the epoch goes on";
  EXPECT_THAT(lost(), ElementsAre(is_fault));
}

TEST_P(StageRunnerDeviceTest, NoEpochOpensOnADeviceThatHasFaulted) {
  Start(1);
  faults_.FaultWith(absl::InternalError("cudaErrorECCUncorrectable"));
  PipelineDriver driver(clients_);
  EXPECT_THAT(driver.Open("router-0", "e1"),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("cudaErrorECCUncorrectable")));
  ASSERT_TRUE(IsIdleSoon());
  EXPECT_EQ(lost().size(), 2u) << "at the epoch's begin and its end";
  EXPECT_EQ(stages_[0].worker_metrics->epochs.Value(), 0);
}

TEST_P(StageRunnerDeviceTest, AStepThatHangsEndsTheEpochAndIsTold) {
  Start(1);
  PipelineDriver driver(clients_);
  StartWithAStepThatHangs(driver);
  EXPECT_THAT(lost(), IsEmpty());
  faults_.GiveUp();
  EXPECT_THAT(driver.stream(0).Read().status(),
              StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("step 1: the device hangs")));
  ASSERT_TRUE(IsIdleSoon());
  // At once, not only after one more wait for the device.
  EXPECT_THAT(lost(), ElementsAre(StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("step 1")),
                                  StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("hangs"))));
}

TEST_P(StageRunnerDeviceTest, WithNobodyToTellTheProcessEndsWithAMessage) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto lose = [this] {
    options_.on_device_lost = nullptr;
    Start(1);
    PipelineDriver driver(clients_);
    StartWithASequence(driver);
    faults_.FaultWith(absl::InternalError("cudaErrorIllegalAddress"));
    (void)driver.Feed(0, 1, 0, tokens_);
    (void)IsIdleSoon();
  };
  EXPECT_EXIT(lose(), ::testing::ExitedWithCode(70), "device_lost device=faulty .*cudaErrorIllegalAddress");
}

TEST_P(StageRunnerDeviceTest, WithoutMemoryASnapshotIsRefusedAndStepsGoOn) {
  Start(1);
  PipelineDriver driver(clients_);
  StartWithASequence(driver);
  const absl::StatusOr<v1::SnapshotManifest> manifest = driver.Save(0, 1, 0, "first", kTestFingerprint);
  ASSERT_THAT(manifest, IsOk());
  store_->Close();  // The memory of one copy is in use.
  ASSERT_THAT(driver.WriteAll(SaveOf(0, 1, 0, "second")), IsOk());
  store_->WaitForWaiting(1);
  faults_.SetNoMemory(true);
  EXPECT_THAT(driver.Save(0, 1, 0, "third", kTestFingerprint).status(),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("no memory")));
  EXPECT_THAT(driver.Feed(0, 1, 0, tokens_), IsOk());
  store_->Open();
  const absl::StatusOr<v1::ExecuteResponse> second = driver.stream(0).Read();
  ASSERT_THAT(second, IsOk());
  EXPECT_EQ(second->saved().status().code(), 0);
  faults_.SetNoMemory(false);
  EXPECT_THAT(driver.Save(0, 1, tokens_.size(), "fourth", kTestFingerprint), IsOk());
  EXPECT_THAT(lost(), IsEmpty());
}

TEST_P(StageRunnerDeviceTest, DrainEndsAnEpochWhoseStepHangsAtHalfItsTime) {
  Start(1);
  PipelineDriver driver(clients_);
  StartWithAStepThatHangs(driver);
  const absl::Time begin = absl::Now();
  stages_[0].runner->Drain(begin + absl::Seconds(4));
  const absl::Duration took = absl::Now() - begin;
  EXPECT_GE(took, absl::Seconds(2)) << "the router has its time to leave";
  EXPECT_LT(took, absl::Seconds(4)) << "nothing is being saved";
  EXPECT_THAT(driver.stream(0).Read().status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("drains")));
  faults_.GoOn();
  EXPECT_TRUE(IsIdleSoon());
  EXPECT_THAT(lost(), IsEmpty());
}

TEST_P(StageRunnerDeviceTest, DrainOfAnIdleWorkerEndsAtOnce) {
  Start(1);
  const absl::Time begin = absl::Now();
  for (int i = 0; i < 2; ++i) {
    stages_[0].runner->Drain(begin + absl::Minutes(10));
    EXPECT_TRUE(stages_[0].runner->draining());
  }
  EXPECT_LT(absl::Now() - begin, absl::Minutes(4));
}

TEST_P(StageRunnerDeviceTest, DrainWaitsNoLongerThanItMayForSnapshots) {
  Start(1);
  PipelineDriver driver(clients_);
  StartWithASequence(driver);
  store_->Close();
  ASSERT_THAT(driver.WriteAll(SaveOf(0, 1, 0, "snap")), IsOk());
  store_->WaitForWaiting(1);
  const absl::Time begin = absl::Now();
  stages_[0].runner->Drain(begin + absl::Seconds(1));
  EXPECT_GE(absl::Now(), begin + absl::Seconds(1)) << "a record may still come";
  EXPECT_THAT(driver.stream(0).Read().status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("drains")));
  EXPECT_TRUE(IsIdleSoon());
}

TEST_P(StageRunnerDeviceTest, DrainEndsAnEpochThatWaitsForOneThatHangs) {
  Start(1);
  PipelineDriver driver(clients_);
  StartWithAStepThatHangs(driver);
  const std::unique_ptr<ExecuteStream> next = OpenNext();
  EXPECT_THAT(driver.stream(0).Read().status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("e2 took over")));
  EXPECT_EQ(stages_[0].runner->driver().epoch, "e2");
  EXPECT_FALSE(stages_[0].runner->WaitUntilIdle(absl::Now()));
  stages_[0].runner->Drain(absl::Now() + absl::Minutes(10));
  EXPECT_THAT(next->Read().status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("drains")));
  EXPECT_EQ(stages_[0].runner->driver().epoch, "");
  faults_.GoOn();
  EXPECT_TRUE(IsIdleSoon());
  EXPECT_EQ(stages_[0].worker_metrics->epochs.Value(), 1) << "e2 has never been open";
}

// All of them wait behind a step that hangs: neither the router's steps, in which there is no room for anything else,
// nor the worker's own go first twice.
TEST_P(StageRunnerDeviceTest, OwnStepsAndTheRoutersTakeTurns) {
  Start(1);
  PipelineDriver driver(clients_);
  StartWithASequence(driver);
  ASSERT_THAT(driver.AttachFresh(1, 2), IsOk());
  faults_.Hang();
  v1::Step first;
  *first.add_entries() = Entry(0, 1, 0, tokens_, false, true);
  first.mutable_entries(0)->set_go_on_until(tokens_.size() + 1000);
  ASSERT_THAT(driver.WriteStep(std::move(first)), IsOk());
  constexpr uint64_t kSteps = 30;
  const uint64_t rows = stages_[0].engine->options().max_batch_tokens;
  for (uint64_t i = 0; i < kSteps; ++i) {
    v1::Step step;
    *step.add_entries() = Entry(1, 2, i * rows, std::vector<uint32_t>(rows, 4), false);
    ASSERT_THAT(driver.WriteStep(std::move(step)), IsOk());
  }
  faults_.GoOn();
  std::vector<uint64_t> ids;
  do {
    const absl::StatusOr<v1::ExecuteResponse> response = driver.stream(0).Read();
    ASSERT_THAT(response, IsOk());
    ids.push_back(response->step().step_id());
    ASSERT_LE(ids.size(), 3 * kSteps) << "the router's wait";
  } while (ids.back() != 1 + kSteps);
  // Of the router's three are begun before the first has a result.
  for (size_t i = 3; i + 1 < ids.size(); ++i) EXPECT_NE(ids[i] == 0, ids[i + 1] == 0) << "twice at " << i;
}

// What hangs is not that router's any more.
TEST_P(StageRunnerDeviceTest, AnotherRouterFollowsAnEpochThatHasEndedAndHangs) {
  Start(1);
  PipelineDriver driver(clients_);
  StartWithAStepThatHangs(driver);
  driver.stream(0).Cancel();
  const std::unique_ptr<ExecuteStream> next = OpenNext("router-1");
  EXPECT_EQ(stages_[0].runner->driver().router, "router-1");
  faults_.GoOn();
  EXPECT_THAT(next->Read(), IsOk()) << "it is open";
}

// A runner that goes does not wait for an epoch that never had its turn, either.
TEST_P(StageRunnerDeviceTest, ARunnerThatGoesEndsTheEpochThatWaits) {
  Start(1);
  PipelineDriver driver(clients_);
  StartWithAStepThatHangs(driver);
  const std::unique_ptr<ExecuteStream> waiting = OpenNext();
  std::thread goes([this] { stages_[0].runner.reset(); });
  EXPECT_THAT(waiting->Read().status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("shuts down")));
  faults_.GoOn();
  goes.join();
}

INSTANTIATE_TEST_SUITE_P(Devices, StageRunnerDeviceTest, ::testing::Values("reference"),
                         [](const ::testing::TestParamInfo<const char*>& info) { return std::string(info.param); });

}  // namespace
}  // namespace rwkv::worker
