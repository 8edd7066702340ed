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
#include "prometheus/histogram.h"
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

  // Each record in a call of its own, unless they are to share it.
  void Start(SnapshotTransfer::Options options = {}, size_t call_bytes = 1) {
    options.first_save_call_bytes = options.save_call_bytes = options.load_call_bytes = call_bytes;
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

  // Into `to`, which is as long as the records are to be.
  SnapshotTransfer::LoadJob MakeLoad(std::vector<v1::RecordInfo> infos, std::vector<std::string>* to) {
    SnapshotTransfer::LoadJob job;
    job.store = store_;
    job.records = std::move(infos);
    job.room = [to]() -> absl::StatusOr<std::vector<absl::Span<char>>> {
      std::vector<absl::Span<char>> room;
      for (std::string& record : *to) room.push_back(absl::MakeSpan(record));
      return room;
    };
    job.wanted = [] { return true; };
    return job;
  }
  // Of a byte each, into loaded_.
  SnapshotTransfer::LoadJob MakeLoad(const std::string& id, int records) {
    std::vector<v1::RecordInfo> infos(records);
    for (int i = 0; i < records; ++i) {
      infos[i].set_snapshot_id(id);
      infos[i].set_layer(4 + i);
      infos[i].set_bytes(1);
    }
    loaded_.resize(records, " ");
    return MakeLoad(std::move(infos), &loaded_);
  }
  // What the job answers.
  absl::Status Answer(SnapshotTransfer::LoadJob job) {
    const auto answer = std::make_shared<absl::Status>();
    const auto done = std::make_shared<absl::Notification>();
    job.done = [answer, done](const absl::Status& status) {
      *answer = status;
      done->Notify();
    };
    EXPECT_THAT(transfer_->Load(std::move(job)), IsOk());
    return done->WaitForNotificationWithTimeout(absl::Seconds(30)) ? *answer : absl::UnknownError("no answer");
  }
  absl::Status Answer(SnapshotTransfer::SaveJob job) {
    const auto answer = std::make_shared<absl::Status>();
    job.done = [answer](const absl::StatusOr<std::vector<v1::RecordInfo>>& result) { *answer = result.status(); };
    EXPECT_THAT(transfer_->Save(std::move(job)), IsOk());
    return transfer_->WaitUntilSaved(absl::Now() + absl::Seconds(30)) ? *answer : absl::UnknownError("no answer");
  }
  static uint64_t Count(const prometheus::Histogram& histogram) { return histogram.Collect().histogram.sample_count; }

  const std::unique_ptr<common::Metrics> metrics_;
  WorkerMetrics worker_metrics_;
  const std::shared_ptr<MemoryRecords> store_ = std::make_shared<MemoryRecords>();
  std::vector<std::string> loaded_;
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
  std::vector<std::string> records = {std::string(5, ' '), std::string(7, ' ')};
  SnapshotTransfer::LoadJob load = MakeLoad(infos, &records);
  load.done = [&](const absl::Status& status) {
    EXPECT_THAT(status, IsOk());
    loaded.Notify();
  };
  ASSERT_THAT(transfer_->Load(std::move(load)), IsOk());
  ASSERT_TRUE(loaded.WaitForNotificationWithTimeout(absl::Seconds(30))) << "no answer to the load";
  EXPECT_THAT(records, ElementsAre("first", "second!"));
}

TEST_F(SnapshotTransferTest, SmallRecordsShareACall) {
  Start({}, /*call_bytes=*/7);
  EXPECT_THAT(Answer(MakeSave("s", {"abc", "defg", "h", "longer than a call", "i", "j"})), IsOk());
  EXPECT_EQ(store_->calls(), 4) << "abc defg, h, the long one, i j";
  EXPECT_EQ(store_->size(), 6u);
  EXPECT_THAT(Answer(MakeSave("t", {"a", "b", "c"})), IsOk());
  EXPECT_EQ(store_->calls(), 5);
  EXPECT_THAT(Answer(MakeLoad("t", 3)), IsOk());
  EXPECT_THAT(loaded_, ElementsAre("a", "b", "c"));
  EXPECT_EQ(store_->calls(), 6);
  store_->Drop("t", 5);
  EXPECT_THAT(Answer(MakeLoad("t", 3)),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("snapshot t, layers 4 to 6: no such")));
}

TEST_F(SnapshotTransferTest, ASmallLoadIsSharedOutAmongTheThreads) {
  SnapshotTransfer::Options options;
  options.load_threads = 3;
  options.min_load_call_bytes = 2;
  Start(options, /*call_bytes=*/100);
  EXPECT_THAT(Answer(MakeSave("s", std::vector<std::string>(9, "x"))), IsOk());
  EXPECT_EQ(store_->calls(), 1);
  EXPECT_THAT(Answer(MakeLoad("s", 9)), IsOk());
  EXPECT_EQ(store_->calls(), 1 + 3);
  EXPECT_THAT(Answer(MakeLoad("s", 3)), IsOk());
  EXPECT_EQ(store_->calls(), 1 + 3 + 2) << "no fewer than two bytes";
}

TEST_F(SnapshotTransferTest, ALoadIntoRoomForOtherRecordsIsDataLoss) {
  Start();
  ASSERT_THAT(store_->PutRecord({}, absl::MakeConstSpan("four", 4), nullptr, absl::InfiniteFuture()), IsOk());
  for (std::vector<std::string> records : {std::vector<std::string>{}, {"    ", "    "}, {"     "}}) {
    absl::Notification done;
    SnapshotTransfer::LoadJob load = MakeLoad({v1::RecordInfo()}, &records);
    load.done = [&](const absl::Status& status) {
      EXPECT_THAT(status, StatusIs(absl::StatusCode::kDataLoss));
      done.Notify();
    };
    ASSERT_THAT(transfer_->Load(std::move(load)), IsOk());
    ASSERT_TRUE(done.WaitForNotificationWithTimeout(absl::Seconds(30))) << "no answer to the load";
  }
}

TEST_F(SnapshotTransferTest, ALoadWithoutRoomFailsAndAsksForNothing) {
  Start();
  store_->Close();
  absl::Notification done;
  std::vector<std::string> records;
  SnapshotTransfer::LoadJob load = MakeLoad({v1::RecordInfo()}, &records);
  load.room = [] { return absl::ResourceExhaustedError("no memory"); };
  load.done = [&](const absl::Status& status) {
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("no memory")));
    done.Notify();
  };
  ASSERT_THAT(transfer_->Load(std::move(load)), IsOk());
  ASSERT_TRUE(done.WaitForNotificationWithTimeout(absl::Seconds(30))) << "no answer to the load";
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
  std::vector<std::string> room(1);
  SnapshotTransfer::LoadJob first = MakeLoad({v1::RecordInfo()}, &room);
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
  EXPECT_EQ(worker_metrics_.snapshot_bytes_in_flight.Value(), 40);
  EXPECT_EQ(worker_metrics_.save_overflows.Value(), 0);
  EXPECT_THAT(save("more", 1), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("40 bytes")));
  EXPECT_EQ(worker_metrics_.save_overflows.Value(), 1);
  EXPECT_THAT(transfer_->CheckRoom("more", 1), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("40 bytes")));
  store_->Open();
  ASSERT_TRUE(transfer_->WaitUntilSaved(absl::Now() + absl::Seconds(30)));
  EXPECT_EQ(worker_metrics_.snapshot_bytes_in_flight.Value(), 0);
  EXPECT_THAT(transfer_->CheckRoom("more", 1), IsOk());
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

TEST_F(SnapshotTransferTest, TimesAreOfWhatArrivedAndErrorsAreCounted) {
  Start();
  EXPECT_THAT(Answer(MakeSave("s", {"a", "b"})), IsOk());
  EXPECT_THAT(Answer(MakeLoad("s", 2)), IsOk());
  EXPECT_EQ(Count(worker_metrics_.snapshot_save_seconds), 1u);
  EXPECT_EQ(Count(worker_metrics_.snapshot_load_seconds), 1u);
  EXPECT_EQ(worker_metrics_.save_errors.Value(), 0);
  EXPECT_THAT(Answer(MakeLoad("s", 3)),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("snapshot s, layer 6: no such")));
  store_->FailWith(absl::UnavailableError("the store is away"));
  EXPECT_THAT(Answer(MakeSave("t", {"a"})),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("snapshot t, layer 4: ")));
  EXPECT_THAT(Answer(MakeLoad("s", 1)), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("snapshot s, layer 4: ")));
  EXPECT_EQ(Count(worker_metrics_.snapshot_save_seconds), 1u);
  EXPECT_EQ(Count(worker_metrics_.snapshot_load_seconds), 1u);
  EXPECT_EQ(worker_metrics_.save_errors.Value(), 1);
}

// Who has no job of its own takes records of one that runs.
TEST_F(SnapshotTransferTest, TheRecordsOfAJobTravelTogether) {
  SnapshotTransfer::Options options;
  options.load_threads = options.save_threads = 3;
  Start(options);
  for (const bool saves : {true, false}) {
    SCOPED_TRACE(saves);
    store_->Close();
    absl::Notification done;
    if (saves) {
      SnapshotTransfer::SaveJob job = MakeSave("s", {"a", "b", "c"});
      job.done = [&](const auto& result) { done.Notify(); };
      ASSERT_THAT(transfer_->Save(std::move(job)), IsOk());
    } else {
      SnapshotTransfer::LoadJob job = MakeLoad("s", 3);
      job.done = [&](const absl::Status& status) {
        EXPECT_THAT(status, IsOk());
        EXPECT_THAT(loaded_, ElementsAre("a", "b", "c"));
        done.Notify();
      };
      ASSERT_THAT(transfer_->Load(std::move(job)), IsOk());
    }
    store_->WaitForWaiting(3);
    store_->Open();
    ASSERT_TRUE(done.WaitForNotificationWithTimeout(absl::Seconds(30)));
  }
}

TEST_F(SnapshotTransferTest, AfterAnErrorNoRecordIsBegun) {
  SnapshotTransfer::Options options;
  options.load_threads = options.save_threads = 1;
  Start(options);
  store_->FailWith(absl::UnavailableError("the store is away"));
  int asked = 0;  // By the job's one thread: before it begins, and before each record.
  SnapshotTransfer::LoadJob load = MakeLoad("s", 5);
  load.wanted = [&] { return ++asked > 0; };
  EXPECT_THAT(Answer(std::move(load)), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_EQ(asked, 2);
  asked = 0;
  SnapshotTransfer::SaveJob save = MakeSave("s", {"a", "b", "c"});
  save.wanted = [&] { return ++asked > 0; };
  EXPECT_THAT(Answer(std::move(save)), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_EQ(asked, 2);
}

TEST_F(SnapshotTransferTest, AJobThatIsNotWantedHalfWayEndsThere) {
  SnapshotTransfer::Options options;
  options.load_threads = options.save_threads = 1;
  Start(options);
  int asked = 0;
  SnapshotTransfer::SaveJob save = MakeSave("s", {"a", "b", "c"});
  save.wanted = [&] { return ++asked < 3; };
  EXPECT_THAT(Answer(std::move(save)), StatusIs(absl::StatusCode::kCancelled));
  EXPECT_EQ(store_->size(), 1u);
  EXPECT_THAT(Answer(MakeSave("t", {"a", "b"})), IsOk());
  asked = 0;
  SnapshotTransfer::LoadJob load = MakeLoad("t", 2);
  load.wanted = [&] { return ++asked < 3; };
  EXPECT_THAT(Answer(std::move(load)), StatusIs(absl::StatusCode::kCancelled));
}

TEST_F(SnapshotTransferTest, WaitingLoadsAreBounded) {
  SnapshotTransfer::Options options;
  options.load_threads = 1;
  options.max_waiting_loads = 2;
  Start(options);
  store_->Close();
  const auto load = [&] {
    SnapshotTransfer::LoadJob job = MakeLoad("s", 1);  // Some run when the test is over.
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
  options.call_timeout = absl::Milliseconds(20);
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
  EXPECT_THAT(Answer(MakeLoad("s", 1)),
              StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("snapshot s, layer 4")));
}

}  // namespace
}  // namespace rwkv::worker
