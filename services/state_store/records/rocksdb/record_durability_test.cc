// What a crash of the machine leaves of large records, whichever writes of before it reached the disk.
#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rocksdb/env.h"
#include "services/state_store/records/rocksdb/rocksdb_record_store.h"
#include "services/state_store/testing/background.h"
#include "services/state_store/testing/fault_file_system.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::HasSubstr;
using testing::IsOkAndHolds;
using testing::StatusIs;

constexpr size_t kLarge = RocksdbRecordStore::kFileBytes;

bool IsRecordFile(const std::string& path) { return absl::EndsWith(path, ".record"); }

class RecordDurabilityTest : public ::testing::Test {
 protected:
  RecordDurabilityTest()
      : file_system_(std::make_shared<FaultFileSystem>()), env_(rocksdb::NewCompositeEnv(file_system_)) {
    // A folder that the store makes itself.
    root_ = NewTestFolder();
    TestStore::Options options;
    options.env = env_.get();
    options.data_dir = root_ + "/made/data";
    store_ = std::make_unique<TestStore>(options);
  }

  RecordStore& records() { return store_->records(); }

  // The store as it starts after a crash at this moment.
  std::unique_ptr<TestStore> Crash(const std::function<bool(const std::string& path)>& survives = nullptr) {
    const std::string image = NewTestFolder();
    file_system_->CopyAsAfterCrash(root_, image, survives);
    TestStore::Options after;
    after.data_dir = image + "/made/data";
    return std::make_unique<TestStore>(after);
  }
  void FailSyncs(bool fail) {
    file_system_->FailSyncsWith(fail ? rocksdb::IOStatus::IOError("broken") : rocksdb::IOStatus::OK());
  }

  const std::shared_ptr<FaultFileSystem> file_system_;
  const std::unique_ptr<rocksdb::Env> env_;
  std::string root_;
  std::unique_ptr<TestStore> store_;
  const std::string data_ = TestRecordData(1, kLarge);
  const v1::RecordInfo x_ = TestRecordInfo("x", 0, data_);
};

TEST_F(RecordDurabilityTest, WhatWasMadeDurableOutlivesACrashThatTakesTheRest) {
  const v1::RecordInfo other = TestRecordInfo("other", 0, data_), later = TestRecordInfo("x", 1, data_);
  ASSERT_OK(records().Put(x_, data_));
  ASSERT_OK(records().MakeDurable());
  ASSERT_OK(records().Put(other, data_));
  ASSERT_OK(records().Put(later, data_));
  const std::unique_ptr<TestStore> after = Crash();
  EXPECT_THAT(after->records().Get(x_), IsOkAndHolds(data_));
  for (const v1::RecordInfo& lost : {other, later}) {
    EXPECT_THAT(after->records().Get(lost), StatusIs(StatusCode::kNotFound));
  }
  EXPECT_EQ(after->records().bytes(), kLarge);
  // In a file that was there already.
  ASSERT_OK(records().MakeDurable());
  EXPECT_THAT(Crash()->records().Get(later), IsOkAndHolds(data_));
}

TEST_F(RecordDurabilityTest, BytesThatACrashTookAreNotTrusted) {
  ASSERT_OK(records().Put(x_, data_));
  // What another's commit, or the kernel, writes out meanwhile.
  ASSERT_OK(store_->records_database().Sync());
  const std::unique_ptr<TestStore> after = Crash([](const std::string& path) { return !IsRecordFile(path); });
  EXPECT_THAT(after->records().Check(x_), StatusIs(StatusCode::kDataLoss));
  ASSERT_OK(after->records().Put(x_, data_));
  EXPECT_THAT(after->records().Get(x_), IsOkAndHolds(data_));
}

TEST_F(RecordDurabilityTest, ARecordWhoseFsyncFailedIsPutAgain) {
  const v1::RecordInfo before = TestRecordInfo("x", 1, data_), small = TestRecordInfo("x", 2, std::string("abc"));
  ASSERT_OK(records().Put(before, data_));
  ASSERT_OK(records().MakeDurable());
  ASSERT_OK(records().Put(x_, data_));
  FailSyncs(true);
  EXPECT_THAT(records().MakeDurable(), StatusIs(StatusCode::kUnavailable, HasSubstr("broken")));
  FailSyncs(false);
  ASSERT_OK(records().MakeDurable());
  EXPECT_THAT(records().Check(x_), StatusIs(StatusCode::kDataLoss));
  EXPECT_EQ(records().bytes(), kLarge);
  ASSERT_OK(records().Put(small, std::string("abc")));
  ASSERT_OK(records().Put(x_, data_));
  ASSERT_OK(records().MakeDurable());
  const std::unique_ptr<TestStore> after = Crash();
  for (const v1::RecordInfo& info : {before, x_}) EXPECT_THAT(after->records().Get(info), IsOkAndHolds(data_));
}

TEST_F(RecordDurabilityTest, ADeletionOfWhichACrashUndidOnlyTheRowIsNotTrusted) {
  ASSERT_OK(records().Put(x_, data_));
  ASSERT_OK(records().MakeDurable());
  ASSERT_OK(records().Delete("x"));
  const std::unique_ptr<TestStore> after = Crash();
  EXPECT_THAT(after->records().Check(x_), StatusIs(StatusCode::kDataLoss, HasSubstr("gone")));
  EXPECT_THAT(after->records().Put(x_, data_), StatusIs(StatusCode::kDataLoss, HasSubstr("gone")));
  ASSERT_OK(after->records().Delete("x"));
  ASSERT_OK(after->records().Put(x_, data_));
  EXPECT_THAT(after->records().Get(x_), IsOkAndHolds(data_));
}

TEST_F(RecordDurabilityTest, RecordsThatHaveAllComeAreMadeDurableUnasked) {
  const v1::RecordInfo second = TestRecordInfo("x", 1, data_), other = TestRecordInfo("x2", 0, data_);
  // With the rows of those whose bytes are durable, which a manifest would find otherwise.
  const auto is_durable = [&](const v1::RecordInfo& info) {
    return store_->records_database().Sync().ok() && Crash()->records().Get(info).ok();
  };
  ASSERT_OK(records().Put(x_, data_));
  records().MakeDurableSoon("x", 2);  // One has not come.
  ASSERT_OK(records().Put(other, data_));
  records().MakeDurableSoon("x2", 1);
  ASSERT_TRUE(Eventually([&] { return is_durable(other); }));
  EXPECT_THAT(Crash()->records().Get(x_), StatusIs(StatusCode::kNotFound));
  ASSERT_OK(records().Put(second, data_));
  records().MakeDurableSoon("x", 2);
  ASSERT_TRUE(Eventually([&] { return is_durable(second); }));
  EXPECT_THAT(Crash()->records().Get(x_), IsOkAndHolds(data_));
}

TEST_F(RecordDurabilityTest, WhoAsksForItWaitsForWhatIsBeingMadeDurableAlready) {
  file_system_->SlowSyncs(absl::Milliseconds(20));
  v1::SnapshotManifest manifest;
  for (int i = 0; i < 10; ++i) {
    manifest.set_snapshot_id(absl::StrCat("x", i));
    *manifest.add_records() = TestRecordInfo(manifest.snapshot_id(), 0, data_);
    ASSERT_OK(records().Put(manifest.records(0), data_));
    records().MakeDurableSoon(manifest.snapshot_id(), 1);
    // The one it is waited for has been begun, or has not.
    const absl::Time begin = absl::Now();
    ASSERT_TRUE(Eventually([&] { return absl::Now() >= begin + absl::Milliseconds(i); }));
    ASSERT_OK(records().MakeDurable(manifest));
    ASSERT_OK(store_->records_database().Sync());
    EXPECT_THAT(Crash()->records().Get(manifest.records(0)), IsOkAndHolds(data_));
    manifest.clear_records();
  }
}

TEST_F(RecordDurabilityTest, WhatCouldNotBeMadeDurableUnaskedIsPutAgain) {
  FailSyncs(true);
  ASSERT_OK(records().Put(x_, data_));
  records().MakeDurableSoon("x", 1);
  ASSERT_TRUE(Eventually([&] { return absl::IsDataLoss(records().Check(x_)); }));
  FailSyncs(false);
  ASSERT_OK(records().Put(x_, data_));
  ASSERT_OK(records().MakeDurable());
  EXPECT_THAT(Crash()->records().Get(x_), IsOkAndHolds(data_));
}

// --- With a manifest --------------------------------------------------------------------------------------------------

class CommittedRecordsTest : public RecordDurabilityTest {
 protected:
  v1::SnapshotManifest Put(const std::string& id, int first_layer, int layers, v1::SnapshotManifest manifest = {}) {
    manifest.set_snapshot_id(id);
    manifest.set_session_id("s");
    manifest.set_position(3);
    manifest.set_model_fingerprint(kTestModel);
    for (int layer = first_layer; layer < first_layer + layers; ++layer) {
      *manifest.add_records() = TestRecordInfo(id, layer, Data(layer));
      EXPECT_OK(records().Put(manifest.records(layer), Data(layer)));
    }
    return manifest;
  }
  static std::string Data(int layer) { return TestRecordData(10 + layer, kLarge + layer); }
};

TEST_F(CommittedRecordsTest, AreThereThoughTheirRowsNeverReachedTheDisk) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Create("s"));
  ASSERT_OK(store_->AddTurn(lease, "r", {1, 2}, {3}));
  v1::SnapshotManifest manifest = Put("mine", 0, 2);
  ASSERT_OK(records().MakeDurable()) << "with the rows of some of them, as another's commit may";
  manifest = Put("mine", 2, 2, manifest);
  const v1::SnapshotManifest nobodys = Put("nobodys", 0, 1);
  const uint64_t syncs = store_->records_database().wal_syncs();
  ASSERT_OK(store_->store().CommitSnapshot(lease, store_->LogBranch("s"), manifest));
  EXPECT_EQ(store_->records_database().wal_syncs(), syncs) << "one fsync less";
  std::mt19937 random(1);
  for (int crash = 0; crash < 6; ++crash) {
    const std::unique_ptr<TestStore> after = Crash([&](const std::string&) { return crash > 0 && random() % 2 == 0; });
    for (int start = 0; start < 2; ++start) {
      ASSERT_OK_AND_ASSIGN(const auto found, after->catalog().FindSnapshot("s", 3, kTestModel));
      ASSERT_TRUE(found.has_value());
      for (const v1::RecordInfo& info : found->records()) {
        EXPECT_THAT(after->records().Get(info), IsOkAndHolds(Data(info.layer()))) << "crash " << crash;
      }
      EXPECT_EQ(found->records_size(), 4);
      EXPECT_THAT(after->records().Check(nobodys.records(0)), StatusIs(StatusCode::kDataLoss));
      ASSERT_OK(after->Reopen());
    }
  }
}

TEST_F(CommittedRecordsTest, OfAnFsyncThatFailedForAnotherAreNotCommitted) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Create("s"));
  ASSERT_OK(store_->AddTurn(lease, "r", {1, 2}, {3}));
  const v1::SnapshotManifest manifest = Put("mine", 0, 2);
  FailSyncs(true);
  EXPECT_FALSE(records().MakeDurable().ok());
  FailSyncs(false);
  EXPECT_THAT(store_->store().CommitSnapshot(lease, store_->LogBranch("s"), manifest),
              StatusIs(StatusCode::kDataLoss, HasSubstr("does not exist")));
  ASSERT_OK_AND_ASSIGN(const auto found, store_->catalog().FindSnapshot("s", 3, kTestModel));
  EXPECT_FALSE(found.has_value());
}

TEST_F(RecordDurabilityTest, AtEveryMomentOfACrashWhatPassesIsWholeAndWhatWasDurableIsThere) {
  constexpr int kThreads = 3;
  const std::string small = TestRecordData(2, 100);
  const auto infos = [&](const std::string& snapshot_id) {
    return std::vector<v1::RecordInfo>{TestRecordInfo(snapshot_id, 0, data_), TestRecordInfo(snapshot_id, 1, small),
                                       TestRecordInfo(snapshot_id, 2, data_)};
  };
  const auto id = [](int thread, int step) { return absl::StrCat("x", thread, ".", step); };
  // Of each thread: snapshots from `deleting` on are there, those before `durable` are durable.
  std::atomic<int> durable[kThreads] = {}, deleting[kThreads] = {}, begun[kThreads] = {};
  Background background;
  for (int thread = 0; thread < kThreads; ++thread) {
    background.Run([&, thread] {
      for (int step = 0; !background.ending(); ++step) {
        begun[thread] = step + 1;
        for (const v1::RecordInfo& info : infos(id(thread, step))) {
          ASSERT_OK(records().Put(info, info.layer() == 1 ? small : data_));
        }
        if (step % 3 == 0) records().MakeDurableSoon(id(thread, step), 2);
        if (step % 2 == 1) {  // Of every other the next one's MakeDurable() is the first.
          ASSERT_OK(records().MakeDurable());
          durable[thread] = step + 1;
        }
        if (step < 4) continue;
        deleting[thread] = step - 3;
        ASSERT_OK(records().Delete(id(thread, step - 4)));
      }
    });
  }
  std::mt19937 random(1);
  int passed = 0;
  for (int crash = 0; crash < 12; ++crash) {
    const int start = durable[0];
    ASSERT_TRUE(Eventually([&] { return durable[0] >= start + 4; })) << "nothing is durable beyond " << start;
    int there[kThreads];
    for (int thread = 0; thread < kThreads; ++thread) there[thread] = durable[thread];
    const std::unique_ptr<TestStore> after = Crash([&](const std::string&) { return random() % 2 == 0; });
    for (int thread = 0; thread < kThreads; ++thread) {
      for (int step = deleting[thread]; step < there[thread]; ++step) {
        for (const v1::RecordInfo& info : infos(id(thread, step))) EXPECT_OK(after->records().Get(info)) << crash;
      }
      for (int step = std::max(0, there[thread] - 20); step < begun[thread]; ++step) {
        for (const v1::RecordInfo& info : infos(id(thread, step))) {
          if (!after->records().Check(info).ok()) continue;
          ++passed;
          EXPECT_OK(after->records().Get(info)) << crash;
        }
      }
    }
    if (HasFailure()) break;
  }
  background.End();
  EXPECT_GT(passed, 12);
}

}  // namespace
}  // namespace rwkv::state_store
