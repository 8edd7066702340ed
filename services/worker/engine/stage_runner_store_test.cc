// Snapshots beside running steps.
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
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/grpc_status.h"
#include "services/worker/engine/snapshot_transfer.h"
#include "services/worker/engine/stage_runner.h"
#include "services/worker/engine/worker_metrics.h"
#include "services/worker/testing/memory_records.h"
#include "services/worker/testing/pipeline_driver.h"
#include "services/worker/testing/runner_fixture.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

using StageRunnerStoreTest = RunnerFixture;

TEST_P(StageRunnerStoreTest, ASnapshotGoesToTheStoreAndComesBackInAnotherEpoch) {
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

TEST_P(StageRunnerStoreTest, AKeptStateIsTakenFromMemoryWithTheSameBits) {
  options_.kept_state_bytes = 1 << 20;
  Start(2);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1", "store"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  ASSERT_THAT(driver.Feed(0, 1, 0, tokens_), IsOk());
  const auto kept = driver.Save(0, 1, tokens_.size(), "kept", kTestFingerprint, true);
  const auto other = driver.Save(0, 1, tokens_.size(), "other", kTestFingerprint);
  ASSERT_THAT(kept, IsOk());
  ASSERT_THAT(other, IsOk());
  const absl::StatusOr<DrivenStep> expected = driver.Feed(0, 1, tokens_.size(), {4, 4});
  ASSERT_THAT(expected, IsOk());

  // Also of an epoch before, and as often as it is asked for.
  ASSERT_THAT(driver.Open("router-0", "e2", "store"), IsOk());
  store_->FailWith(absl::UnavailableError("the store is away"));
  for (uint64_t sequence : {77, 78}) {
    v1::AttachSequence attach = FromSnapshot(static_cast<int>(sequence - 74), sequence, *kept);
    attach.set_keep(true);
    ASSERT_THAT(driver.Attach(attach), IsOk());
    const auto restored = driver.Feed(static_cast<int>(sequence - 74), sequence, tokens_.size(), {4, 4});
    ASSERT_THAT(restored, IsOk());
    EXPECT_EQ(restored->logits.at(sequence), expected->logits.at(1));
  }
  v1::AttachSequence attach = FromSnapshot(5, 80, *other);
  attach.set_keep(true);
  EXPECT_THAT(driver.Attach(attach), StatusIs(absl::StatusCode::kUnavailable));
  // What had to be fetched once stays.
  store_->FailWith(absl::OkStatus());
  attach.set_sequence(81);
  ASSERT_THAT(driver.Attach(attach), IsOk());
  store_->FailWith(absl::UnavailableError("the store is away"));
  attach.set_slot(6);
  attach.set_sequence(82);
  EXPECT_THAT(driver.Attach(attach), IsOk());
}

TEST_P(StageRunnerStoreTest, AMissingRecordIsDataLossAndOtherErrorsPass) {
  Start(2);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1", "store"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  ASSERT_THAT(driver.Feed(0, 1, 0, tokens_), IsOk());
  const absl::StatusOr<v1::SnapshotManifest> manifest = driver.Save(0, 1, tokens_.size(), "snap", kTestFingerprint);
  ASSERT_THAT(manifest, IsOk());
  store_->FailWith(absl::UnavailableError("the store is away"));
  EXPECT_THAT(driver.Attach(FromSnapshot(1, 2, *manifest)),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("snapshot snap, layers ")));
  EXPECT_THAT(driver.Save(0, 1, tokens_.size(), "other", kTestFingerprint).status(),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("away")));
  store_->FailWith(absl::OkStatus());
  store_->Drop("snap", 4);
  EXPECT_THAT(driver.Attach(FromSnapshot(1, 3, *manifest)),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("layers 3 to 4: no such")));
  EXPECT_EQ(stages_[0].worker_metrics->attach_errors.Value(), 1);
  EXPECT_EQ(stages_[1].worker_metrics->attach_errors.Value(), 2);
  for (Stage& stage : stages_) EXPECT_EQ(stage.worker_metrics->save_errors.Value(), 1);
  // Nothing of it stays behind: stage 0 had the records, stage 1 had not.
  EXPECT_THAT(driver.Feed(1, 3, tokens_.size(), {1}).status(), StatusIs(absl::StatusCode::kAborted));
  EXPECT_THAT(driver.Feed(0, 1, tokens_.size(), {1}), IsOk());
  EXPECT_EQ(stages_[1].worker_metrics->slots_used.Value(), 1) << "the slot is free again";
}

TEST_P(StageRunnerStoreTest, StepsGoOnWhileTheStoreIsHeldUp) {
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
  ASSERT_THAT(driver.WriteAll(SaveOf(0, 1, tokens_.size(), "late")), IsOk());
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

TEST_P(StageRunnerStoreTest, SavesBeyondTheBoundAreRefusedAtOnce) {
  SnapshotTransfer::Options transfer;
  transfer.max_save_bytes = 1;  // One at a time.
  Start(1, transfer);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1", "store"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  store_->Close();
  ASSERT_THAT(driver.WriteAll(SaveOf(0, 1, 0, "first")), IsOk());
  EXPECT_THAT(driver.Save(0, 1, 0, "second", kTestFingerprint).status(),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("second")));
  store_->Open();
  const absl::StatusOr<v1::ExecuteResponse> first = driver.stream(0).Read();
  ASSERT_THAT(first, IsOk());
  EXPECT_EQ(first->saved().snapshot_id(), "first");
  EXPECT_THAT(common::FromStatusProto(first->saved().status()), IsOk());
  EXPECT_EQ(first->saved().records_size(), 5);
}

TEST_P(StageRunnerStoreTest, ASlotReleasedWhileItLoadsStaysFree) {
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
  EXPECT_EQ(late->attached().slot(), 1);
  EXPECT_EQ(late->attached().sequence(), 2u);
  EXPECT_THAT(common::FromStatusProto(late->attached().status()), StatusIs(absl::StatusCode::kAborted));
  EXPECT_THAT(driver.Feed(1, 3, 0, tokens_), IsOk());
}

TEST_P(StageRunnerStoreTest, AnEpochEndsAtOnceWhileTheStoreIsHeldUp) {
  Start(2);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1", "store"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  store_->Close();
  ASSERT_THAT(driver.WriteAll(SaveOf(0, 1, 0, "snap")), IsOk());
  store_->WaitForWaiting(2);
  driver.Close();
  for (Stage& stage : stages_) EXPECT_TRUE(stage.runner->WaitUntilIdle(absl::Now() + absl::Seconds(10)));
  ASSERT_THAT(driver.Open("router-0", "e2", "store"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  EXPECT_THAT(driver.Feed(0, 1, 0, tokens_), IsOk());
}

TEST_P(StageRunnerStoreTest, DrainSavesWhatWasBegunAndThenEndsTheEpoch) {
  Start(1);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1", "store"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  store_->Close();
  ASSERT_THAT(driver.WriteAll(SaveOf(0, 1, 0, "snap")), IsOk());
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

TEST_P(StageRunnerStoreTest, ASnapshotNeedsAStateStore) {
  Start(1);
  PipelineDriver driver(clients_);
  ASSERT_THAT(driver.Open("router-0", "e1", "store"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  const absl::StatusOr<v1::SnapshotManifest> manifest = driver.Save(0, 1, 0, "snap", kTestFingerprint);
  ASSERT_THAT(manifest, IsOk());
  ASSERT_THAT(driver.Open("router-0", "e2"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  EXPECT_THAT(driver.Save(0, 1, 0, "snap", kTestFingerprint).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("state store")));
  EXPECT_THAT(driver.Attach(FromSnapshot(1, 2, *manifest)),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("the epoch has no state store")));
  EXPECT_EQ(stages_[0].worker_metrics->attach_errors.Value(), 1);
  EXPECT_THAT(driver.Feed(0, 1, 0, tokens_), IsOk());
  EXPECT_EQ(stages_[0].worker_metrics->slots_used.Value(), 1) << "the slot is free again";
}

// Saves of a sequence that goes on change nothing of its tokens or its neighbour's, and each is of its position.
TEST_P(StageRunnerStoreTest, SavesBesideRunningStepsChangeNoBit) {
  Start(2);
  PipelineDriver driver(clients_);
  std::vector<std::string> logits[2];
  std::vector<v1::SnapshotManifest> manifests;
  const int steps = protects_memory() ? 3 : 12;
  for (const bool saves : {false, true}) {
    ASSERT_THAT(driver.Open("router-0", saves ? "e2" : "e1", "store"), IsOk());
    for (int slot : {0, 1}) ASSERT_THAT(driver.AttachFresh(slot, slot + 1), IsOk());
    for (int i = 0; i < steps; ++i) {
      v1::Step step;
      *step.add_entries() = Entry(0, 1, i, {tokens_[i % tokens_.size()]});
      *step.add_entries() = Entry(1, 2, 2 * i, {3, 4});
      ASSERT_THAT(driver.WriteStep(std::move(step)), IsOk());
      if (saves) {
        ASSERT_THAT(driver.stream(0).Write(SaveOf(0, 1, i + 1, absl::StrCat("snap-", i + 1))), IsOk());
      }
    }
    for (int i = 0; i < steps; ++i) {
      const absl::StatusOr<DrivenStep> step = driver.ReadStep();
      ASSERT_THAT(step, IsOk());
      logits[saves].push_back(step->logits.at(1) + step->logits.at(2));
    }
  }
  EXPECT_EQ(logits[1], logits[0]);
  for (int i = 0; i < steps; ++i) {
    const absl::StatusOr<v1::ExecuteResponse> saved = driver.stream(0).Read();
    ASSERT_THAT(saved, IsOk());
    ASSERT_THAT(common::FromStatusProto(saved->saved().status()), IsOk()) << saved->saved().snapshot_id();
  }
  ASSERT_TRUE(stages_[0].transfer->WaitUntilSaved(absl::Now() + absl::Seconds(30))) << "all saves have answered";
  EXPECT_EQ(stages_[0].worker_metrics->snapshot_bytes_in_flight.Value(), 0);
  // Each record is what one sequence alone has at that position.
  EnginePipeline twin(path_, 1);
  ASSERT_THAT(twin.AttachFresh(0, 1), IsOk());
  for (int i = 0; i < steps; ++i) {
    ASSERT_THAT(twin.Feed(0, 1, i, {tokens_[i % tokens_.size()]}), IsOk());
    const std::string expected = (*twin.CopyState(0, 1, i + 1))[1];
    v1::RecordInfo info;
    info.set_snapshot_id(absl::StrCat("snap-", i + 1));
    info.set_layer(1);
    info.set_bytes(expected.size());
    EXPECT_EQ(*store_->GetRecord(info, absl::InfiniteFuture()), expected) << i + 1;
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, StageRunnerStoreTest, ::testing::Values("auto", kLazyDevice, kProtectedDevice),
                         [](const ::testing::TestParamInfo<const char*>& info) { return std::string(info.param); });

}  // namespace
}  // namespace rwkv::worker
