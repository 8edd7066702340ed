// On the real file system: what the folder of an idle store has in it after its sessions are gone.
#include "services/state_store/rocksdb/reclaim.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/metrics.h"
#include "services/state_store/embedded_state_store.h"
#include "services/state_store/testing/background.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::IsOkAndHolds;
using testing::StatusIs;

constexpr uint64_t kMiB = 1 << 20;
constexpr int kLayers = 21;
constexpr size_t kRecordBytes = 100 << 10;

// --- What is worth it -----------------------------------------------------------------------------------------------

TEST(FilesToRewriteTest, SmallStoreGivesBackAllAndLargeOneWhatIsWorthIt) {
  const uint64_t large = 1000 * kMiB;
  EXPECT_EQ(FilesToRewrite({}), 0u);
  EXPECT_EQ(FilesToRewrite({{kMiB, 0}, {kMiB, 0}}), 0u);
  EXPECT_EQ(FilesToRewrite({{kMiB, 0}, {kMiB, 1}, {kMiB, 0}}), 2u) << "as few as have garbage";
  EXPECT_EQ(FilesToRewrite({{kMiB, 1}, {large, 0}}), 1u) << "only what is moved has to be little";
  EXPECT_EQ(FilesToRewrite({{kMiB, kMiB}}), 1u);
  EXPECT_EQ(FilesToRewrite({{large, large / 10}}), 0u) << "a tenth of a large store";
  EXPECT_EQ(FilesToRewrite({{large, large / 6}}), 0u) << "a fifth of what lives";
  EXPECT_EQ(FilesToRewrite({{large, large / 6 + 10}}), 1u) << "and a little more";
  EXPECT_EQ(FilesToRewrite({{large, large / 2}, {large, large / 10}, {large, 0}}), 1u) << "until little is left";
  EXPECT_EQ(FilesToRewrite({{large, 0}, {large, large / 2}}), 2u) << "an old file is in the way";
}

TEST(ShouldCompactTest, SmallFamiliesAlwaysAndLargeOnesFromAFifth) {
  EXPECT_FALSE(ShouldCompact(100, 0, kMiB));
  EXPECT_TRUE(ShouldCompact(1000, 1, kMiB));
  EXPECT_TRUE(ShouldCompact(1000, 1, kCheapBytes));
  EXPECT_FALSE(ShouldCompact(1000, 200, kCheapBytes + 1));
  EXPECT_TRUE(ShouldCompact(1000, 201, kCheapBytes + 1));
}

// --- The folder -----------------------------------------------------------------------------------------------------

class ReclaimTest : public ::testing::Test {
 protected:
  // All files, the log included. RocksDB deletes what a compaction replaced in its own time, so this waits, within
  // bounds, until no more than `want` is left.
  uint64_t FolderBytes(uint64_t want) { return FolderBytes(store_.data_dir(), want); }
  static uint64_t FolderBytes(const std::string& folder, uint64_t want) {
    uint64_t bytes = 0;
    Eventually(
        [&] {
          bytes = 0;
          for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
            std::error_code gone;  // Between listing and looking.
            const bool file = entry.is_regular_file(gone);
            const uintmax_t size = gone || !file ? 0 : entry.file_size(gone);
            if (!gone) bytes += size;
          }
          return bytes <= want;
        },
        absl::Seconds(30));
    return bytes;
  }
  // A session with a snapshot of some 2 MiB, in records that are too small for files of their own.
  void MakeSession(const std::string& id, uint32_t seed) {
    ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create(id));
    ASSERT_OK(store_.AddTurn(lease, "r", {1, 2, 3}, {4}));
    v1::SnapshotManifest manifest;
    manifest.set_snapshot_id(absl::StrCat("x-", id));
    manifest.set_session_id(id);
    manifest.set_position(4);
    manifest.set_model_fingerprint(kTestModel);
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::string data = TestRecordData(seed * kLayers + layer, kRecordBytes);
      *manifest.add_records() = TestRecordInfo(manifest.snapshot_id(), layer, data);
      ASSERT_OK(store_.records().Put(manifest.records(layer), data));
    }
    ASSERT_OK(store_.store().CommitSnapshot(lease, store_.LogBranch(id), manifest));
    ASSERT_OK(store_.catalog().ReleaseLease(lease));
    store_.clock().Advance(absl::Seconds(1));
  }
  void Delete(const std::string& id) {
    ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Acquire(id));
    ASSERT_OK(store_.store().DeleteSession(lease));
  }
  void ExpectWhole(const std::string& id, uint32_t seed) {
    EXPECT_THAT(store_.Tokens(id), IsOkAndHolds(testing::ElementsAre(1, 2, 3, 4)));
    ASSERT_OK_AND_ASSIGN(const auto manifest, store_.catalog().FindSnapshot(id, 4, kTestModel));
    ASSERT_TRUE(manifest.has_value());
    for (int layer = 0; layer < kLayers; ++layer) {
      EXPECT_THAT(store_.records().Get(manifest->records(layer)),
                  IsOkAndHolds(TestRecordData(seed * kLayers + layer, kRecordBytes)));
    }
  }
  double Reclaimed() { return store_.metrics().Counter("rwkv_state_store_reclaimed_bytes_total", "").Value(); }

  static TestStore::Options StoreOptions() {
    TestStore::Options options;
    options.limits.idle_ttl = absl::Hours(1);
    return options;
  }
  TestStore store_{StoreOptions()};
};

TEST_F(ReclaimTest, DeletedBeforeTheyWereEverFlushed) {
  for (uint32_t i = 0; i < 8; ++i) MakeSession(absl::StrCat("s", i), i);
  for (uint32_t i = 1; i < 8; ++i) Delete(absl::StrCat("s", i));
  EXPECT_GE(FolderBytes(UINT64_MAX), 14 * kMiB) << "the log has it all";
  ASSERT_OK(store_.Reclaim());
  EXPECT_LE(FolderBytes(3 * kMiB), 3 * kMiB);
  ExpectWhole("s0", 0);
}

TEST_F(ReclaimTest, DeletedFromBlobFilesAmongSessionsThatLive) {
  for (uint32_t i = 0; i < 8; ++i) MakeSession(absl::StrCat("s", i), i);
  {
    ASSERT_OK_AND_ASSIGN(const Database::Access access, store_.records_database().Read());
    ASSERT_TRUE(access.db().Flush(rocksdb::FlushOptions(), access.family(Family::kRecords)).ok());
  }
  ASSERT_OK(store_.Reopen());  // As files of an earlier run.
  EXPECT_GE(FolderBytes(UINT64_MAX), 16 * kMiB);
  for (uint32_t i = 0; i < 8; ++i) {
    if (i != 3 && i != 6) Delete(absl::StrCat("s", i));
  }
  ASSERT_OK(store_.Reclaim());
  EXPECT_LE(FolderBytes(5 * kMiB), 5 * kMiB);
  EXPECT_GE(Reclaimed(), 11 * kMiB);
  ExpectWhole("s3", 3);
  ExpectWhole("s6", 6);
  ASSERT_OK(store_.Reopen());
  ExpectWhole("s3", 3);
  ASSERT_OK(CheckCatalogRows(store_.rows(), 8));
}

TEST_F(ReclaimTest, EndedByTheirIdleTimeAndAfterARestart) {
  for (uint32_t i = 0; i < 4; ++i) MakeSession(absl::StrCat("s", i), i);
  ASSERT_OK(store_.Reclaim());
  store_.clock().Advance(absl::Hours(1));
  ASSERT_OK(store_.store().SweepSessions());
  EXPECT_THAT(store_.CatalogKeys(), testing::IsEmpty());
  ASSERT_OK(store_.Reopen());  // What it knew of garbage, it knows no more.
  ASSERT_OK(store_.Reclaim());
  EXPECT_LE(FolderBytes(kMiB), kMiB);
}

TEST_F(ReclaimTest, TokensOfALongLogGoToo) {
  {
    ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
    std::vector<uint32_t> tokens(1 << 20);
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<uint32_t>(i * 2654435761u);
    ASSERT_OK(store_.AddTurn(lease, "r", tokens, {1}));
  }
  ASSERT_OK(store_.Reopen());
  EXPECT_GE(FolderBytes(UINT64_MAX), 4 * kMiB);
  Delete("s");
  ASSERT_OK(store_.Reclaim());
  EXPECT_LE(FolderBytes(kMiB), kMiB);
}

TEST_F(ReclaimTest, NothingIsWrittenWhenNothingWasDeleted) {
  for (uint32_t i = 0; i < 3; ++i) MakeSession(absl::StrCat("s", i), i);
  ASSERT_OK(store_.Reclaim());
  ASSERT_OK(store_.Reclaim());
  const auto files = [&] {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(store_.data_dir())) {
      if (entry.path().extension() == ".sst" || entry.path().extension() == ".blob") names.push_back(entry.path());
    }
    std::sort(names.begin(), names.end());
    return names;
  };
  const std::vector<std::string> before = files();
  ASSERT_OK(store_.Reclaim());
  EXPECT_EQ(files(), before);
}

TEST_F(ReclaimTest, StoreServesWhileItReclaims) {
  for (uint32_t i = 0; i < 4; ++i) MakeSession(absl::StrCat("s", i), i);
  Background background;
  background.Run([&] {
    while (!background.ending()) EXPECT_OK(store_.Reclaim());
  });
  for (uint32_t round = 0; round < 10; ++round) {
    const std::string id = absl::StrCat("t", round);
    MakeSession(id, 100 + round);
    ExpectWhole(id, 100 + round);
    if (round > 0) Delete(absl::StrCat("t", round - 1));
  }
  background.End();
  for (uint32_t i = 0; i < 4; ++i) ExpectWhole(absl::StrCat("s", i), i);
  ASSERT_OK(store_.Reclaim());
  EXPECT_LE(FolderBytes(11 * kMiB), 11 * kMiB);
}

TEST_F(ReclaimTest, IdleStoreDoesItAllByItself) {
  EmbeddedStateStore::Options options;
  options.database.data_dir = NewTestFolder() + "/data";
  options.store.limits.idle_ttl = absl::Minutes(30);
  options.session_sweep_interval = absl::Milliseconds(5);
  options.reclaim_interval = absl::Milliseconds(5);
  rwkv::testing::FakeClock clock;
  const auto metrics = *common::Metrics::Create("");
  ASSERT_OK_AND_ASSIGN(const auto embedded, EmbeddedStateStore::Create(options, &clock, metrics.get()));
  for (uint32_t i = 0; i < 4; ++i) {
    const std::string id = absl::StrCat("s", i);
    ASSERT_OK(embedded->store().CreateSession(id, "").status());
    ASSERT_OK_AND_ASSIGN(const LeaseGrant grant,
                         embedded->store().catalog().AcquireLease(id, "router-0", "1", absl::Minutes(1)));
    const std::vector<uint32_t> token_ids = {1, 2, 3};
    NewTurn turn;
    turn.request_id = "r";
    turn.token_ids = token_ids;
    turn.model_fingerprint = kTestModel;
    ASSERT_OK(embedded->store().BeginTurn(grant.lease, turn).status());
    ASSERT_OK(
        AppendOne(embedded->store().catalog(), TestAppend(grant.lease, "r", 3, {4}, v1::FINISH_REASON_STOP_TOKEN)));
    v1::SnapshotManifest manifest;
    manifest.set_snapshot_id(absl::StrCat("x", i));
    manifest.set_session_id(id);
    manifest.set_position(4);
    manifest.set_model_fingerprint(kTestModel);
    const std::string data = TestRecordData(i, 2 * kMiB);
    *manifest.add_records() = TestRecordInfo(manifest.snapshot_id(), 0, data);
    ASSERT_OK(embedded->store().records().Put(manifest.records(0), data));
    ASSERT_OK(embedded->store().CommitSnapshot(grant.lease, grant.log_branch, manifest));
  }
  EXPECT_GE(FolderBytes(options.database.data_dir, UINT64_MAX), 8 * kMiB);
  EXPECT_EQ(embedded->store().catalog().counts().sessions, 4);
  clock.Advance(absl::Hours(1));
  EXPECT_LE(FolderBytes(options.database.data_dir, kMiB), kMiB);
  EXPECT_EQ(embedded->store().catalog().counts().sessions, 0);
}

TEST_F(ReclaimTest, FailedWriteEndsIt) {
  // Else opening the files again, and with it every call, would wait for its end.
  std::atomic<bool> canceled{true};
  for (uint32_t i = 0; i < 2; ++i) MakeSession(absl::StrCat("s", i), i);
  ASSERT_OK_AND_ASSIGN(const Database::Access access, store_.records_database().Read());
  std::vector<rocksdb::ColumnFamilyHandle*> families;
  for (int i = 0; i < kFamilyCount; ++i) families.push_back(access.family(static_cast<Family>(i)));
  rocksdb::WriteBatch batch;
  batch.Delete(families[1], "k");
  ASSERT_TRUE(access.db().Write(rocksdb::WriteOptions(), &batch).ok());
  EXPECT_THAT(ReclaimSpace(access.db(), families, &canceled), StatusIs(StatusCode::kCancelled));
}

TEST_F(ReclaimTest, DatabaseThatGoesDoesNotBegin) {
  store_.database().CancelReclaim();
  EXPECT_THAT(store_.Reclaim(), StatusIs(StatusCode::kCancelled));
}

}  // namespace
}  // namespace rwkv::state_store
