// Epochs, links in process, and snapshots beside running steps.
#include "services/worker/engine/stage_runner.h"

#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "prometheus/histogram.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/grpc_status.h"
#include "services/common/metrics.h"
#include "services/worker/engine/router_registry.h"
#include "services/worker/engine/snapshot_transfer.h"
#include "services/worker/engine/worker_metrics.h"
#include "services/worker/link/inproc_link.h"
#include "services/worker/testing/memory_records.h"
#include "services/worker/testing/pipeline_driver.h"
#include "services/worker/testing/runner_client.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

class StageRunnerTest : public ::testing::TestWithParam<const char*> {
 protected:
  struct Stage {
    std::unique_ptr<common::Metrics> metrics;
    std::unique_ptr<WorkerMetrics> worker_metrics;
    std::unique_ptr<StageEngine> engine;
    std::unique_ptr<LinkTransport> links;
    std::unique_ptr<SnapshotTransfer> transfer;
    std::unique_ptr<StageRunner> runner;
  };

  static void SetUpTestSuite() {
    path_ = absl::StrCat(std::getenv("TEST_TMPDIR"), "/runner.safetensors");
    rwkv::testing::RandomModelOptions options;
    options.layers = 5;
    options.width = 32;
    options.head_size = 16;
    options.vocab_size = 67;
    ASSERT_THAT(rwkv::testing::WriteRandomModel(options, path_), IsOk());
  }

  ~StageRunnerTest() override {
    store_->Open();  // Nobody waits for a record any more.
    // In-process links end when either side does, so the order is free.
    stages_.clear();
  }

  void Start(int stages, SnapshotTransfer::Options transfer = {}) {
    for (int i = 0; i < stages; ++i) {
      Stage stage;
      absl::StatusOr<std::unique_ptr<common::Metrics>> metrics = common::Metrics::Create("");
      ASSERT_THAT(metrics, IsOk());
      stage.metrics = *std::move(metrics);
      stage.worker_metrics = std::make_unique<WorkerMetrics>(*stage.metrics);
      TestEngineOptions options;
      options.device = GetParam();
      absl::StatusOr<std::unique_ptr<StageEngine>> engine = MakeTestEngine(path_, i, stages, options);
      ASSERT_THAT(engine, IsOk());
      stage.engine = *std::move(engine);
      const std::string address = absl::StrCat("stage-", i);
      stage.links = network_.Join(address, stage.engine->link_shape());
      stage.transfer = std::make_unique<SnapshotTransfer>(transfer, stage.worker_metrics.get());
      stage.runner = std::make_unique<StageRunner>(
          stage.engine.get(), stage.links.get(), stage.transfer.get(), [store = store_] { return store; },
          stage.worker_metrics.get(), &routers_);
      clients_.push_back(MakeRunnerClient(address, stage.runner.get()));
      stages_.push_back(std::move(stage));
    }
  }

  void ExpectGoesOnByItself(int stages);

  static bool WaitUntil(const std::function<bool()>& condition) {
    const absl::Time deadline = absl::Now() + absl::Seconds(30);
    while (!condition() && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(1));
    return condition();
  }

  v1::AttachSequence FromSnapshot(int slot, uint64_t sequence, const v1::SnapshotManifest& manifest) const {
    v1::AttachSequence attach;
    attach.set_slot(slot);
    attach.set_sequence(sequence);
    attach.set_position(manifest.position());
    *attach.mutable_snapshot() = manifest;
    return attach;
  }

  static std::string path_;
  rwkv::testing::FakeClock clock_;
  RouterRegistry routers_{&clock_};
  InprocLinkNetwork network_;
  const std::shared_ptr<MemoryRecords> store_ = std::make_shared<MemoryRecords>();
  std::vector<Stage> stages_;
  std::vector<std::shared_ptr<WorkerClient>> clients_;
  const std::vector<uint32_t> tokens_ = {1, 5, 66, 0, 7, 7, 31, 2, 40, 12, 3};
};

std::string StageRunnerTest::path_;

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

TEST_P(StageRunnerTest, ASnapshotGoesToTheStoreAndComesBackInAnotherEpoch) {
  Start(2);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1", "store"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  ASSERT_THAT(driver.Feed(0, 1, 0, tokens_), IsOk());
  const absl::StatusOr<v1::SnapshotManifest> manifest = driver.Save(0, 1, tokens_.size(), "snap", kTestFingerprint);
  ASSERT_THAT(manifest, IsOk());
  ASSERT_EQ(manifest->records_size(), 5);
  for (int layer = 0; layer < 5; ++layer) {
    EXPECT_EQ(manifest->records(layer).layer(), layer);
    EXPECT_EQ(manifest->records(layer).snapshot_id(), "snap");
    EXPECT_NE(manifest->records(layer).crc32c(), 0u);
  }
  const absl::StatusOr<DrivenStep> expected = driver.Feed(0, 1, tokens_.size(), {4, 4});
  ASSERT_THAT(expected, IsOk());

  ASSERT_THAT(driver.Open("router-0", "e2", "store"), IsOk());
  ASSERT_THAT(driver.Attach(FromSnapshot(3, 77, *manifest)), IsOk());
  const absl::StatusOr<DrivenStep> restored = driver.Feed(3, 77, tokens_.size(), {4, 4});
  ASSERT_THAT(restored, IsOk());
  EXPECT_EQ(restored->logits.at(77), expected->logits.at(1));
}

TEST_P(StageRunnerTest, AMissingRecordIsDataLossAndOtherErrorsPass) {
  Start(2);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1", "store"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  ASSERT_THAT(driver.Feed(0, 1, 0, tokens_), IsOk());
  const absl::StatusOr<v1::SnapshotManifest> manifest = driver.Save(0, 1, tokens_.size(), "snap", kTestFingerprint);
  ASSERT_THAT(manifest, IsOk());
  store_->FailWith(absl::UnavailableError("the store is away"));
  EXPECT_THAT(driver.Attach(FromSnapshot(1, 2, *manifest)),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("snapshot snap, layer ")));  // They travel together.
  EXPECT_THAT(driver.Save(0, 1, tokens_.size(), "other", kTestFingerprint).status(),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("away")));
  store_->FailWith(absl::OkStatus());
  store_->Drop("snap", 4);
  EXPECT_THAT(driver.Attach(FromSnapshot(1, 3, *manifest)),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("layer 4")));
  EXPECT_EQ(stages_[0].worker_metrics->attach_errors.Value(), 1);
  EXPECT_EQ(stages_[1].worker_metrics->attach_errors.Value(), 2);
  for (Stage& stage : stages_) EXPECT_EQ(stage.worker_metrics->save_errors.Value(), 1);
  // Nothing of it stays behind: stage 0 had the records, stage 1 had not.
  EXPECT_THAT(driver.Feed(1, 3, tokens_.size(), {1}).status(), StatusIs(absl::StatusCode::kAborted));
  EXPECT_THAT(driver.Feed(0, 1, tokens_.size(), {1}), IsOk());
}

TEST_P(StageRunnerTest, StepsGoOnWhileTheStoreIsHeldUp) {
  Start(1);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1", "store"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  ASSERT_THAT(driver.Feed(0, 1, 0, tokens_), IsOk());
  const absl::StatusOr<v1::SnapshotManifest> manifest = driver.Save(0, 1, tokens_.size(), "snap", kTestFingerprint);
  ASSERT_THAT(manifest, IsOk());
  store_->Close();
  v1::ExecuteRequest attach;
  *attach.mutable_attach() = FromSnapshot(1, 2, *manifest);
  ASSERT_THAT(driver.WriteAll(attach), IsOk());
  v1::ExecuteRequest save;
  save.mutable_save()->set_slot(0);
  save.mutable_save()->set_sequence(1);
  save.mutable_save()->set_expected_position(tokens_.size());
  save.mutable_save()->set_snapshot_id("late");
  ASSERT_THAT(driver.WriteAll(save), IsOk());
  store_->WaitForWaiting(2);
  for (uint64_t i = 0; i < 5; ++i) ASSERT_THAT(driver.Feed(0, 1, tokens_.size() + i, {3}), IsOk());
  store_->Open();
  bool attached = false, saved = false;
  for (int i = 0; i < 2; ++i) {
    const absl::StatusOr<v1::ExecuteResponse> response = driver.stream(0).Read();
    ASSERT_THAT(response, IsOk());
    if (response->has_attached()) attached = response->attached().status().code() == 0;
    if (response->has_saved()) saved = response->saved().status().code() == 0;
  }
  EXPECT_TRUE(attached);
  EXPECT_TRUE(saved);
}

TEST_P(StageRunnerTest, SavesBeyondTheBoundAreRefusedAtOnce) {
  SnapshotTransfer::Options transfer;
  transfer.max_save_bytes = 1;  // One at a time.
  Start(1, transfer);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1", "store"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  store_->Close();
  v1::ExecuteRequest save;
  save.mutable_save()->set_slot(0);
  save.mutable_save()->set_sequence(1);
  save.mutable_save()->set_snapshot_id("first");
  ASSERT_THAT(driver.WriteAll(save), IsOk());
  EXPECT_THAT(driver.Save(0, 1, 0, "second", kTestFingerprint).status(),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("second")));
  store_->Open();
  const absl::StatusOr<v1::ExecuteResponse> first = driver.stream(0).Read();
  ASSERT_THAT(first, IsOk());
  EXPECT_EQ(first->saved().snapshot_id(), "first");
  EXPECT_THAT(common::FromStatusProto(first->saved().status()), IsOk());
  EXPECT_EQ(first->saved().records_size(), 5);
}

TEST_P(StageRunnerTest, ASlotReleasedWhileItLoadsStaysFree) {
  Start(1);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1", "store"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  ASSERT_THAT(driver.Feed(0, 1, 0, tokens_), IsOk());
  const absl::StatusOr<v1::SnapshotManifest> manifest = driver.Save(0, 1, tokens_.size(), "snap", kTestFingerprint);
  ASSERT_THAT(manifest, IsOk());
  store_->Close();
  v1::ExecuteRequest attach;
  *attach.mutable_attach() = FromSnapshot(1, 2, *manifest);
  ASSERT_THAT(driver.WriteAll(attach), IsOk());
  store_->WaitForWaiting(1);
  ASSERT_THAT(driver.Release(1, 2), IsOk());
  ASSERT_THAT(driver.AttachFresh(1, 3), IsOk());
  store_->Open();
  const absl::StatusOr<v1::ExecuteResponse> late = driver.stream(0).Read();
  ASSERT_THAT(late, IsOk());
  EXPECT_EQ(late->attached().sequence(), 2u);
  EXPECT_THAT(common::FromStatusProto(late->attached().status()), StatusIs(absl::StatusCode::kAborted));
  EXPECT_THAT(driver.Feed(1, 3, 0, tokens_), IsOk());
}

TEST_P(StageRunnerTest, AnEpochEndsAtOnceWhileTheStoreIsHeldUp) {
  Start(2);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1", "store"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  store_->Close();
  v1::ExecuteRequest save;
  save.mutable_save()->set_slot(0);
  save.mutable_save()->set_sequence(1);
  save.mutable_save()->set_snapshot_id("snap");
  ASSERT_THAT(driver.WriteAll(save), IsOk());
  store_->WaitForWaiting(2);
  driver.Close();
  for (Stage& stage : stages_) EXPECT_TRUE(stage.runner->WaitUntilIdle(absl::Now() + absl::Seconds(10)));
  ASSERT_THAT(driver.Open("router-0", "e2", "store"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  EXPECT_THAT(driver.Feed(0, 1, 0, tokens_), IsOk());
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
  if (GetParam() == std::string(kProtectedDevice)) GTEST_SKIP() << "slow, and other tests touch the same memory";
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

TEST_P(StageRunnerTest, DrainSavesWhatWasBegunAndThenEndsTheEpoch) {
  Start(1);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1", "store"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  store_->Close();
  v1::ExecuteRequest save;
  save.mutable_save()->set_slot(0);
  save.mutable_save()->set_sequence(1);
  save.mutable_save()->set_snapshot_id("snap");
  ASSERT_THAT(driver.WriteAll(save), IsOk());
  store_->WaitForWaiting(1);
  // Joined when an expectation ends the test, too.
  const auto join = [](std::thread* thread) {
    thread->join();
    delete thread;
  };
  std::unique_ptr<std::thread, decltype(join)> drain(
      new std::thread([this] { stages_[0].runner->Drain(absl::Now() + absl::Seconds(10)); }), join);
  const absl::Time patience = absl::Now() + absl::Seconds(30);
  while (!stages_[0].runner->draining() && absl::Now() < patience) std::this_thread::yield();
  ASSERT_TRUE(stages_[0].runner->draining()) << "Drain() has been called for half a minute";
  PipelineDriver late(clients_);
  EXPECT_THAT(late.Open("router-0", "e2"), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("drains")));
  EXPECT_THAT(driver.Feed(0, 1, 0, tokens_), IsOk()) << "what runs goes on";
  store_->Open();
  const absl::StatusOr<v1::ExecuteResponse> saved = driver.stream(0).Read();
  ASSERT_THAT(saved, IsOk());
  EXPECT_THAT(common::FromStatusProto(saved->saved().status()), IsOk());
  EXPECT_THAT(driver.stream(0).Read().status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("drains")));
  drain.reset();
  EXPECT_EQ(store_->size(), 5u);
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

TEST_P(StageRunnerTest, AUselessCommandEndsTheEpoch) {
  Start(1);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
  ASSERT_THAT(driver.WriteAll(v1::ExecuteRequest()), IsOk());
  EXPECT_THAT(driver.stream(0).Read().status(), StatusIs(absl::StatusCode::kInvalidArgument));
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

TEST_P(StageRunnerTest, ASnapshotNeedsAStateStore) {
  Start(1);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  EXPECT_THAT(driver.Save(0, 1, 0, "snap", kTestFingerprint).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("state store")));
}

// Saves of a sequence that goes on change nothing of its tokens or its neighbour's, and each is of its position.
TEST_P(StageRunnerTest, SavesBesideRunningStepsChangeNoBit) {
  Start(2);
  PipelineDriver driver(clients_);
  std::vector<std::string> logits[2];
  std::vector<v1::SnapshotManifest> manifests;
  constexpr int kSteps = 12;
  for (const bool saves : {false, true}) {
    ASSERT_THAT(driver.Open("router-0", saves ? "e2" : "e1", "store"), IsOk());
    for (int slot : {0, 1}) ASSERT_THAT(driver.AttachFresh(slot, slot + 1), IsOk());
    for (int i = 0; i < kSteps; ++i) {
      v1::Step step;
      *step.add_entries() = Entry(0, 1, i, {tokens_[i % tokens_.size()]});
      *step.add_entries() = Entry(1, 2, 2 * i, {3, 4});
      ASSERT_THAT(driver.WriteStep(std::move(step)), IsOk());
      if (saves) {
        v1::ExecuteRequest save;
        save.mutable_save()->set_slot(0);
        save.mutable_save()->set_sequence(1);
        save.mutable_save()->set_expected_position(i + 1);
        save.mutable_save()->set_snapshot_id(absl::StrCat("snap-", i + 1));
        ASSERT_THAT(driver.stream(0).Write(save), IsOk());
      }
    }
    for (int i = 0; i < kSteps; ++i) {
      const absl::StatusOr<DrivenStep> step = driver.ReadStep();
      ASSERT_THAT(step, IsOk());
      logits[saves].push_back(step->logits.at(1) + step->logits.at(2));
    }
  }
  EXPECT_EQ(logits[1], logits[0]);
  for (int i = 0; i < kSteps; ++i) {
    const absl::StatusOr<v1::ExecuteResponse> saved = driver.stream(0).Read();
    ASSERT_THAT(saved, IsOk());
    ASSERT_THAT(common::FromStatusProto(saved->saved().status()), IsOk()) << saved->saved().snapshot_id();
  }
  ASSERT_TRUE(stages_[0].transfer->WaitUntilSaved(absl::Now() + absl::Seconds(30))) << "all saves have answered";
  EXPECT_EQ(stages_[0].worker_metrics->snapshot_bytes_in_flight.Value(), 0);
  // Each record is what one sequence alone has at that position.
  EnginePipeline twin(path_, 1);
  ASSERT_THAT(twin.AttachFresh(0, 1), IsOk());
  for (int i = 0; i < kSteps; ++i) {
    ASSERT_THAT(twin.Feed(0, 1, i, {tokens_[i % tokens_.size()]}), IsOk());
    v1::RecordInfo info;
    info.set_snapshot_id(absl::StrCat("snap-", i + 1));
    info.set_layer(1);
    EXPECT_EQ(*store_->GetRecord(info, absl::InfiniteFuture()), (*twin.CopyState(0, 1, i + 1))[1]) << i + 1;
  }
}

TEST_P(StageRunnerTest, ASequenceGoesOnByItselfWithTheTokensItIsAskedFor) { ExpectGoesOnByItself(1); }

TEST_P(StageRunnerTest, OfThreeStagesItGoesOnByItselfToo) { ExpectGoesOnByItself(3); }

void StageRunnerTest::ExpectGoesOnByItself(int stages) {
  Start(stages);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  constexpr int kTokens = 20;
  std::vector<uint32_t> asked;
  uint64_t position = 0;
  for (std::vector<uint32_t> fed = tokens_; asked.size() < kTokens; fed = {asked.back()}) {
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
  while (drawn.size() < kTokens || steps_of_the_router.size() < 2) {
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

// What the router says comes to each stage by a stream of its own, and one may be late.
TEST_P(StageRunnerTest, ALaterStageFollowsTheOrderOfTheFirst) {
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
  v1::ExecuteRequest save, go_on;
  save.mutable_save()->set_sequence(1);
  save.mutable_save()->set_expected_position(position);
  save.mutable_save()->set_snapshot_id("snap");
  go_on.mutable_go_on()->set_sequence(1);
  go_on.mutable_go_on()->set_until(position + 3);
  const double tokens = stages_[0].worker_metrics->tokens.Value();
  for (const v1::ExecuteRequest& request : {save, go_on}) ASSERT_THAT(driver.stream(0).Write(request), IsOk());
  ASSERT_TRUE(WaitUntil([&] { return stages_[0].worker_metrics->tokens.Value() > tokens; })) << "the first is ahead";
  EXPECT_EQ(stages_[1].worker_metrics->tokens.Value(), tokens) << "it has not saved yet";
  for (const v1::ExecuteRequest& request : {save, go_on}) ASSERT_THAT(driver.stream(1).Write(request), IsOk());
  int results = 0, saves = 0;
  while (results < 3 || saves < 1) {
    const absl::StatusOr<v1::ExecuteResponse> response = driver.stream(1).Read();
    ASSERT_THAT(response, IsOk());
    EXPECT_EQ(response->saved().status().code(), 0) << response->saved().status().message();
    saves += response->has_saved();
    results += response->has_step();
  }
}

// It is refused, and whoever has the slot by then is not touched.
TEST_P(StageRunnerTest, WhatAnotherSequenceDrewMovesNobody) {
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
}

INSTANTIATE_TEST_SUITE_P(Devices, StageRunnerTest, ::testing::Values("auto", kLazyDevice, kProtectedDevice),
                         [](const ::testing::TestParamInfo<const char*>& info) { return std::string(info.param); });

}  // namespace
}  // namespace rwkv::worker
