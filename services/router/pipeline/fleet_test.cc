#include "services/router/pipeline/fleet.h"

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "services/router/pipeline/stage_plan.h"
#include "services/worker/client/fake_worker.h"
#include "services/worker/client/listening_thread.h"
#include "services/worker/client/worker_client.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait_until.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr absl::Duration kLimit = absl::Seconds(30);

// Remembers what it heard.
class Recorder : public Fleet::Listener {
 public:
  void OnEpochUp(uint64_t epoch, const StagePlan& plan) override {
    absl::MutexLock lock(&mu_);
    up_ = epoch;
    ++ups_;
    stages_ = static_cast<int>(plan.stages.size());
  }
  void OnResponse(uint64_t epoch, int stage, v1::ExecuteResponse response) override {
    absl::MutexLock lock(&mu_);
    EXPECT_EQ(epoch, up_);
    responses_.emplace_back(stage, std::move(response));
  }
  void OnEpochDown(uint64_t epoch, const absl::Status& why) override {
    absl::MutexLock lock(&mu_);
    EXPECT_EQ(epoch, up_);
    up_ = 0;
    why_ = why;
    ++downs_;
  }

  void OnEpochClosing(uint64_t epoch) override {
    absl::MutexLock lock(&mu_);
    closing_ = epoch;
  }

  uint64_t closing() {
    absl::MutexLock lock(&mu_);
    return closing_;
  }
  // The epoch that is up after the `count`th came up.
  uint64_t WaitUp(int count) {
    absl::MutexLock lock(&mu_);
    const auto ready = [this, count]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return ups_ >= count && up_ != 0; };
    EXPECT_TRUE(mu_.AwaitWithTimeout(absl::Condition(&ready), kLimit));
    return up_;
  }
  absl::Status WaitDown(int count) {
    absl::MutexLock lock(&mu_);
    const auto ready = [this, count]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return downs_ >= count; };
    EXPECT_TRUE(mu_.AwaitWithTimeout(absl::Condition(&ready), kLimit));
    return why_;
  }
  std::vector<std::pair<int, v1::ExecuteResponse>> WaitResponses(size_t count) {
    absl::MutexLock lock(&mu_);
    const auto ready = [this, count]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return responses_.size() >= count; };
    EXPECT_TRUE(mu_.AwaitWithTimeout(absl::Condition(&ready), kLimit));
    return responses_;
  }
  int downs() {
    absl::MutexLock lock(&mu_);
    return downs_;
  }

 private:
  absl::Mutex mu_;
  uint64_t up_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t closing_ ABSL_GUARDED_BY(mu_) = 0;
  int ups_ ABSL_GUARDED_BY(mu_) = 0;
  int downs_ ABSL_GUARDED_BY(mu_) = 0;
  int stages_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Status why_ ABSL_GUARDED_BY(mu_);
  std::vector<std::pair<int, v1::ExecuteResponse>> responses_ ABSL_GUARDED_BY(mu_);
};

Fleet::Options Options() {
  Fleet::Options options;
  options.lane.router = "router-0";
  options.lane.incarnation = "test";
  options.min_backoff = absl::Milliseconds(1);
  options.max_backoff = absl::Milliseconds(10);
  return options;
}

std::vector<std::unique_ptr<worker::WorkerClient>> Connect(worker::FakePipeline& fake, int stages) {
  std::vector<std::unique_ptr<worker::WorkerClient>> workers;
  for (int stage = stages - 1; stage >= 0; --stage) workers.push_back(fake.Connect(stage));  // In the wrong order.
  return workers;
}

std::shared_ptr<const v1::ExecuteRequest> Attach(int slot, uint64_t sequence) {
  auto command = std::make_shared<v1::ExecuteRequest>();
  command->mutable_attach()->set_slot(slot);
  command->mutable_attach()->set_sequence(sequence);
  command->mutable_attach()->set_fresh(true);
  return command;
}

// Waits until the pipeline's state shows `text`.
void WaitForText(const Fleet& pipeline, const std::string& text) {
  EXPECT_TRUE(testing::WaitUntil([&] { return absl::StrContains(pipeline.state().text, text); }, kLimit))
      << text << " is not in: " << pipeline.state().text;
}

TEST(FleetTest, CommandsReachEveryStageAndAnswersComeBack) {
  worker::FakePipeline fake({});
  Recorder recorder;
  Fleet pipeline(Options(), TheseWorkers(Connect(fake, 2)), &recorder);
  EXPECT_FALSE(pipeline.state().serving);
  EXPECT_THAT(pipeline.state().status, StatusIs(absl::StatusCode::kUnavailable));
  pipeline.Start();
  const uint64_t epoch = recorder.WaitUp(1);
  WaitForText(pipeline, "serving");  // Told to the listener first.
  EXPECT_TRUE(pipeline.state().serving);
  EXPECT_THAT(pipeline.state().status, IsOk());
  EXPECT_EQ(pipeline.state().model->name(), "fake");
  EXPECT_TRUE(pipeline.Send(epoch, Attach(0, 1)));
  const auto responses = recorder.WaitResponses(2);
  EXPECT_EQ(responses[0].second.attached().sequence(), 1);
  EXPECT_NE(responses[0].first, responses[1].first);
  EXPECT_FALSE(pipeline.Send(epoch + 1, Attach(0, 1)));
  pipeline.Stop();
  EXPECT_EQ(recorder.downs(), 1);
  EXPECT_FALSE(pipeline.Send(epoch, Attach(0, 1)));
}

TEST(FleetTest, ALostWorkerEndsTheEpochAndItsReturnOpensTheNext) {
  worker::FakePipeline fake({});
  Recorder recorder;
  Fleet pipeline(Options(), TheseWorkers(Connect(fake, 2)), &recorder);
  pipeline.Start();
  const uint64_t first = recorder.WaitUp(1);
  fake.Kill(1);
  EXPECT_THAT(recorder.WaitDown(1), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("fake-1:1")));
  EXPECT_FALSE(pipeline.Send(first, Attach(0, 1)));
  WaitForText(pipeline, "connecting: worker fake-1:1");
  EXPECT_THAT(pipeline.state().status, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("fake-1:1")));
  EXPECT_TRUE(pipeline.state().model.has_value());
  fake.Restart(1);
  const uint64_t second = recorder.WaitUp(2);
  EXPECT_GT(second, first);
  EXPECT_TRUE(pipeline.Send(second, Attach(0, 1)));
  recorder.WaitResponses(2);
}

TEST(FleetTest, ALaneWithAWorkerThatDrainsClosesAndIsOverAfterAWhile) {
  worker::FakePipeline fake({});
  Recorder recorder;
  Fleet::Options options = Options();
  options.ask_interval = absl::Milliseconds(5);
  options.closing_timeout = absl::Milliseconds(50);
  Fleet pipeline(options, TheseWorkers(Connect(fake, 2)), &recorder);
  pipeline.Start();
  const uint64_t epoch = recorder.WaitUp(1);
  fake.SetDraining(1, true);
  EXPECT_THAT(recorder.WaitDown(1), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("worker fake-1:1 drains")));
  EXPECT_EQ(recorder.closing(), epoch);
}

TEST(FleetTest, EndEpochOpensANewOne) {
  worker::FakePipeline fake({});
  Recorder recorder;
  Fleet pipeline(Options(), TheseWorkers(Connect(fake, 2)), &recorder);
  pipeline.Start();
  const uint64_t first = recorder.WaitUp(1);
  pipeline.EndEpoch(first + 1, absl::InternalError("of another epoch"));
  pipeline.EndEpoch(first, absl::UnavailableError("no progress"));
  EXPECT_THAT(recorder.WaitDown(1), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("no progress")));
  recorder.WaitUp(2);
  EXPECT_EQ(fake.stats().epochs, 2);
}

TEST(FleetTest, TwoModelsAreShownAndNotServed) {
  worker::FakePipeline fake({});
  worker::FakePipeline::Options other_options;
  other_options.fingerprint = "00000000000000000000000000000bad";
  worker::FakePipeline other(other_options);
  Recorder recorder;
  std::vector<std::unique_ptr<worker::WorkerClient>> workers;
  workers.push_back(fake.Connect(0));
  workers.push_back(other.Connect(1));
  Fleet pipeline(Options(), TheseWorkers(std::move(workers)), &recorder);
  pipeline.Start();
  WaitForText(pipeline, "two different models");
  EXPECT_THAT(pipeline.state().status,
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("00000000000000000000000000000bad"), HasSubstr("fake-0:1"))));
}

TEST(FleetTest, ProbeSaysWhoIsThere) {
  worker::FakePipeline fake({});
  Recorder recorder;
  Fleet pipeline(Options(), TheseWorkers(Connect(fake, 2)), &recorder);
  pipeline.Start();
  recorder.WaitUp(1);
  fake.Kill(0);
  const std::vector<Fleet::WorkerStatus> workers = pipeline.Probe(absl::Now() + kLimit);
  ASSERT_EQ(workers.size(), 2);
  EXPECT_EQ(workers[1].address, "fake-1:1");
  EXPECT_EQ(workers[1].stage_index, 1);
  EXPECT_TRUE(workers[1].status.ok());
  EXPECT_EQ(workers[0].stage_index, 0);
  EXPECT_THAT(workers[0].status, StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_EQ(workers[0].worker.name(), "fake-0");  // From before.
}

// A stage whose stream says what the test wants, until it is cancelled.
class ScriptedStream final : public worker::ExecuteStream {
 public:
  ScriptedStream(int opened, std::function<void(const v1::ExecuteRequest&)> on_write)
      : on_write_(std::move(on_write)), opened_(opened) {}
  ~ScriptedStream() override {
    Cancel();
    listening_.Join();
  }
  absl::Status Write(const v1::ExecuteRequest& request) override {
    on_write_(request);
    return absl::OkStatus();
  }
  absl::StatusOr<v1::ExecuteResponse> Read() override {
    absl::MutexLock lock(&mu_);
    if (opened_ == 0) {
      if (!mu_.AwaitWithTimeout(absl::Condition(&cancelled_), kLimit)) return absl::DeadlineExceededError("no end");
      return absl::CancelledError("cancelled");
    }
    v1::ExecuteResponse response;
    if (opened_ < 0) {
      response.mutable_attached();
      opened_ = 0;
      return response;
    }
    --opened_;
    response.mutable_opened();
    return response;
  }
  void Listen(Heard heard) override { listening_.Start(this, std::move(heard)); }
  void Cancel() override {
    absl::MutexLock lock(&mu_);
    cancelled_ = true;
  }

 private:
  const std::function<void(const v1::ExecuteRequest&)> on_write_;
  worker::ListeningThread listening_;
  absl::Mutex mu_;
  int opened_ ABSL_GUARDED_BY(mu_);  // So often it says that it has opened the epoch; -1: it answers without.
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
};

class ScriptedWorker final : public worker::WorkerClient {
 public:
  ScriptedWorker(std::unique_ptr<worker::WorkerClient> described, int opened)
      : described_(std::move(described)), opened_(opened) {}
  absl::StatusOr<v1::DescribeResponse> Describe(absl::Time deadline) override { return described_->Describe(deadline); }
  std::unique_ptr<worker::ExecuteStream> Execute() override {
    return std::make_unique<ScriptedStream>(opened_, [this](const v1::ExecuteRequest& request) {
      absl::MutexLock lock(&mu_);
      if (request.has_open()) open_ = request.open();
    });
  }
  v1::OpenEpoch WaitOpen() {
    absl::MutexLock lock(&mu_);
    const auto has_come = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return !open_.epoch().empty(); };
    EXPECT_TRUE(mu_.AwaitWithTimeout(absl::Condition(&has_come), kLimit)) << "the stage was not opened";
    return open_;
  }
  std::string address() const override { return described_->address(); }

 private:
  const std::unique_ptr<worker::WorkerClient> described_;
  const int opened_;
  absl::Mutex mu_;
  v1::OpenEpoch open_ ABSL_GUARDED_BY(mu_);  // The last one.
};

TEST(FleetTest, EachStageIsToldItsPlace) {
  worker::FakePipeline fake({});
  Recorder recorder;
  std::vector<std::unique_ptr<worker::WorkerClient>> workers;
  std::vector<ScriptedWorker*> stages;
  for (int stage = 0; stage < 2; ++stage) {
    auto worker = std::make_unique<ScriptedWorker>(fake.Connect(stage), 1);
    stages.push_back(worker.get());
    workers.push_back(std::move(worker));
  }
  Fleet::Options options = Options();
  options.lane.state_store_address = "store:1";
  Fleet pipeline(options, TheseWorkers(std::move(workers)), &recorder);
  pipeline.Start();
  recorder.WaitUp(1);
  for (int stage = 0; stage < 2; ++stage) {
    const v1::OpenEpoch open = stages[stage]->WaitOpen();
    EXPECT_EQ(open.router(), "router-0");
    EXPECT_EQ(open.epoch(), "router-0/test/1");
    EXPECT_EQ(open.stage_index(), stage);
    EXPECT_EQ(open.stage_count(), 2);
    EXPECT_EQ(open.next_address(), stage == 0 ? "fake-1:1" : "");
    EXPECT_EQ(open.state_store_address(), "store:1");
  }
  pipeline.Stop();
}

TEST(FleetTest, AStageThatAnswersWithoutOpeningEndsTheEpoch) {
  worker::FakePipeline fake({});
  Recorder recorder;
  std::vector<std::unique_ptr<worker::WorkerClient>> workers;
  workers.push_back(std::make_unique<ScriptedWorker>(fake.Connect(0), 1));
  workers.push_back(std::make_unique<ScriptedWorker>(fake.Connect(1), -1));
  Fleet pipeline(Options(), TheseWorkers(std::move(workers)), &recorder);
  pipeline.Start();
  WaitForText(pipeline, "worker fake-1:1 (stage 1) answered before it had opened the epoch");
  pipeline.Stop();
  EXPECT_EQ(recorder.downs(), 0) << "it was up";
}

TEST(FleetTest, AStageThatSaysOpenedTwiceCountsOnce) {
  worker::FakePipeline fake({});
  Recorder recorder;
  std::vector<std::unique_ptr<worker::WorkerClient>> workers;
  workers.push_back(std::make_unique<ScriptedWorker>(fake.Connect(0), 0));
  workers.push_back(std::make_unique<ScriptedWorker>(fake.Connect(1), 2));
  Fleet::Options options = Options();
  options.lane.open_timeout = absl::Milliseconds(100);
  Fleet pipeline(options, TheseWorkers(std::move(workers)), &recorder);
  pipeline.Start();
  WaitForText(pipeline, "1 of 2 stages are ready");
  pipeline.Stop();
  EXPECT_EQ(recorder.downs(), 0) << "it was up";
}

TEST(FleetTest, AFullCommandQueueEndsTheEpoch) {
  worker::FakePipeline fake({});
  Recorder recorder;
  Fleet::Options options = Options();
  options.lane.max_queued_commands = 4;
  Fleet pipeline(options, TheseWorkers(Connect(fake, 2)), &recorder);
  pipeline.Start();
  const uint64_t epoch = recorder.WaitUp(1);
  bool sent = true;
  for (int i = 0; sent && i < 1000000; ++i) sent = pipeline.Send(epoch, Attach(0, 1 + i));
  EXPECT_FALSE(sent);
  EXPECT_THAT(recorder.WaitDown(1), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("does not take its commands")));
  recorder.WaitUp(2);
}

}  // namespace
}  // namespace rwkv::router
