#include "services/worker/engine/snapshot_transfer.h"

#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/common/metrics.h"
#include "services/state_store/client/crc32c.h"
#include "services/worker/engine/worker_metrics.h"
#include "services/worker/testing/memory_records.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class SnapshotTransferTest : public ::testing::Test {
 protected:
  SnapshotTransferTest() : metrics_(*common::Metrics::Create("")), worker_metrics_(*metrics_) {}
  ~SnapshotTransferTest() override { store_->Open(); }

  void Start(SnapshotTransfer::Options options = {}) {
    transfer_ = std::make_unique<SnapshotTransfer>(options, &worker_metrics_);
  }

  SnapshotTransfer::SaveJob MakeSave(const std::string& id, std::vector<std::string> layers) {
    SnapshotTransfer::SaveJob job;
    job.store = store_;
    job.snapshot_id = id;
    job.first_layer = 4;
    for (const std::string& layer : layers) job.bytes += static_cast<int64_t>(layer.size());
    job.records = [layers = std::move(layers)]() -> absl::StatusOr<std::vector<absl::Span<const char>>> {
      return std::vector<absl::Span<const char>>(layers.begin(), layers.end());
    };
    job.wanted = [] { return true; };
    return job;
  }

  const std::unique_ptr<common::Metrics> metrics_;
  WorkerMetrics worker_metrics_;
  const std::shared_ptr<MemoryRecords> store_ = std::make_shared<MemoryRecords>();
  std::unique_ptr<SnapshotTransfer> transfer_;
};

TEST_F(SnapshotTransferTest, WhatWasSavedIsLoaded) {
  Start();
  std::vector<v1::RecordInfo> infos;
  absl::Notification saved;
  SnapshotTransfer::SaveJob save = MakeSave("s", {"first", "second!"});
  save.done = [&](absl::StatusOr<std::vector<v1::RecordInfo>> result) {
    ASSERT_THAT(result, IsOk());
    infos = *std::move(result);
    saved.Notify();
  };
  ASSERT_THAT(transfer_->Save(std::move(save)), IsOk());
  ASSERT_TRUE(saved.WaitForNotificationWithTimeout(absl::Seconds(30))) << "no answer to the save";
  ASSERT_EQ(infos.size(), 2u);
  EXPECT_EQ(infos[1].snapshot_id(), "s");
  EXPECT_EQ(infos[1].layer(), 5);
  EXPECT_EQ(infos[1].bytes(), 7u);
  EXPECT_EQ(infos[1].crc32c(), state_store::Crc32c(std::string("second!")));

  absl::Notification loaded;
  SnapshotTransfer::LoadJob load;
  load.store = store_;
  load.records = infos;
  load.wanted = [] { return true; };
  load.done = [&](absl::StatusOr<std::vector<std::string>> result) {
    ASSERT_THAT(result, IsOk());
    EXPECT_THAT(*result, ElementsAre("first", "second!"));
    loaded.Notify();
  };
  ASSERT_THAT(transfer_->Load(std::move(load)), IsOk());
  ASSERT_TRUE(loaded.WaitForNotificationWithTimeout(absl::Seconds(30))) << "no answer to the load";
}

TEST_F(SnapshotTransferTest, WhatIsNoLongerWantedIsDropped) {
  SnapshotTransfer::Options options;
  options.save_threads = 1;
  Start(options);
  store_->Close();
  absl::Notification first_done;
  SnapshotTransfer::SaveJob first = MakeSave("first", {"a"});
  first.done = [&](const auto&) { first_done.Notify(); };
  ASSERT_THAT(transfer_->Save(std::move(first)), IsOk());
  store_->WaitForWaiting(1);
  std::atomic<bool> wanted{true};
  SnapshotTransfer::SaveJob second = MakeSave("second", {"b"});
  second.wanted = [&] { return wanted.load(); };
  second.done = [](const auto&) { FAIL() << "not wanted"; };
  ASSERT_THAT(transfer_->Save(std::move(second)), IsOk());
  wanted = false;
  EXPECT_FALSE(transfer_->WaitUntilSaved(absl::Now()));
  store_->Open();
  ASSERT_TRUE(first_done.WaitForNotificationWithTimeout(absl::Seconds(30))) << "no answer to the first save";
  EXPECT_TRUE(transfer_->WaitUntilSaved(absl::Now() + absl::Seconds(30)));
  EXPECT_EQ(store_->size(), 1u);
}

TEST_F(SnapshotTransferTest, ALoadThatIsNoLongerWantedIsNotAnswered) {
  SnapshotTransfer::Options options;
  options.load_threads = 1;
  Start(options);
  store_->Close();
  absl::Notification first_done, third_done;
  SnapshotTransfer::LoadJob first;
  first.store = store_;
  first.records.resize(1);
  first.wanted = [] { return true; };
  first.done = [&](const auto&) { first_done.Notify(); };
  ASSERT_THAT(transfer_->Load(first), IsOk());
  store_->WaitForWaiting(1);
  SnapshotTransfer::LoadJob second = first;
  second.wanted = [] { return false; };
  second.done = [](const auto&) { FAIL() << "not wanted"; };
  ASSERT_THAT(transfer_->Load(std::move(second)), IsOk());
  SnapshotTransfer::LoadJob third = first;
  third.done = [&](const auto&) { third_done.Notify(); };
  ASSERT_THAT(transfer_->Load(std::move(third)), IsOk());
  store_->Open();
  EXPECT_TRUE(first_done.WaitForNotificationWithTimeout(absl::Seconds(30))) << "no answer to the first load";
  EXPECT_TRUE(third_done.WaitForNotificationWithTimeout(absl::Seconds(30))) << "no answer to the third load";
}

TEST_F(SnapshotTransferTest, BytesInFlightAreBoundedAndFreedAgain) {
  SnapshotTransfer::Options options;
  options.max_save_bytes = 10;
  Start(options);
  store_->Close();
  const auto save = [this](const std::string& id, size_t bytes) {
    SnapshotTransfer::SaveJob job = MakeSave(id, {std::string(bytes, 'x')});
    job.done = [](const auto&) {};
    return transfer_->Save(std::move(job));
  };
  EXPECT_THAT(save("larger than the bound, but alone", 40), IsOk());
  EXPECT_THAT(save("more", 1), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("40 bytes")));
  store_->Open();
  ASSERT_TRUE(transfer_->WaitUntilSaved(absl::Now() + absl::Seconds(30)));
  store_->Close();
  EXPECT_THAT(save("six", 6), IsOk());
  EXPECT_THAT(save("four", 4), IsOk());
  EXPECT_THAT(save("one", 1), StatusIs(absl::StatusCode::kResourceExhausted));
}

TEST_F(SnapshotTransferTest, RecordsThatCannotBeHadAreAnErrorAndSendNothing) {
  Start();
  absl::Notification done;
  SnapshotTransfer::SaveJob job = MakeSave("s", {"a"});
  job.records = [] { return absl::InternalError("slot 3: att.state of layer 1 is not finite"); };
  job.done = [&](const absl::StatusOr<std::vector<v1::RecordInfo>>& result) {
    EXPECT_THAT(result, StatusIs(absl::StatusCode::kInternal, HasSubstr("slot 3")));
    done.Notify();
  };
  ASSERT_THAT(transfer_->Save(std::move(job)), IsOk());
  ASSERT_TRUE(done.WaitForNotificationWithTimeout(absl::Seconds(30))) << "no answer to the save";
  EXPECT_EQ(store_->size(), 0u);
}

TEST_F(SnapshotTransferTest, ASavesMemoryIsFreeOnceItsBytesCountNoMore) {
  Start();
  const auto memory = std::make_shared<std::string>("a");
  SnapshotTransfer::SaveJob job = MakeSave("s", {});
  job.bytes = 1;
  job.records = [memory]() -> absl::StatusOr<std::vector<absl::Span<const char>>> {
    return std::vector<absl::Span<const char>>{*memory};
  };
  job.done = [](const auto&) {};
  ASSERT_THAT(transfer_->Save(std::move(job)), IsOk());
  ASSERT_TRUE(transfer_->WaitUntilSaved(absl::Now() + absl::Seconds(30))) << "the save does not end";
  EXPECT_EQ(memory.use_count(), 1);
}

TEST_F(SnapshotTransferTest, WaitingLoadsAreBounded) {
  SnapshotTransfer::Options options;
  options.load_threads = 1;
  options.max_waiting_loads = 2;
  Start(options);
  store_->Close();
  const auto load = [this] {
    SnapshotTransfer::LoadJob job;
    job.store = store_;
    job.records.emplace_back();
    job.wanted = [] { return true; };
    job.done = [](const auto&) {};
    return transfer_->Load(std::move(job));
  };
  ASSERT_THAT(load(), IsOk());
  store_->WaitForWaiting(1);
  ASSERT_THAT(load(), IsOk());
  ASSERT_THAT(load(), IsOk());
  EXPECT_THAT(load(), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("2 snapshots")));
}

TEST_F(SnapshotTransferTest, AStoreThatHangsCostsTheTimeoutOnly) {
  SnapshotTransfer::Options options;
  options.record_timeout = absl::Milliseconds(20);
  Start(options);
  store_->Close();
  absl::Notification done;
  SnapshotTransfer::SaveJob job = MakeSave("s", {"a"});
  job.done = [&](const absl::StatusOr<std::vector<v1::RecordInfo>>& result) {
    EXPECT_THAT(result, StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("snapshot s, layer 4")));
    done.Notify();
  };
  ASSERT_THAT(transfer_->Save(std::move(job)), IsOk());
  EXPECT_TRUE(done.WaitForNotificationWithTimeout(absl::Seconds(30)));
}

}  // namespace
}  // namespace rwkv::worker
