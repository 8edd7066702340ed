// Records that are found again when the rows, or the list of files, that speak of them have been lost.
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rocksdb/db.h"
#include "rocksdb/env.h"
#include "services/state_store/records/rocksdb/blob_files.h"
#include "services/state_store/records/rocksdb/record_files.h"
#include "services/state_store/records/rocksdb/record_rows.h"
#include "services/state_store/records/rocksdb/record_search.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/files.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

namespace fs = std::filesystem;

using absl::StatusCode;
using testing::ElementsAre;
using testing::IsOkAndHolds;
using testing::Optional;
using testing::StatusIs;

constexpr size_t kLarge = (size_t{128} << 10) + 100;  // In a file, and in no whole number of blocks.

void WriteFile(const std::string& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

// --- In a snapshot's file ---------------------------------------------------------------------------------------------

class SearchFileTest : public ::testing::Test {
 protected:
  void Append(const std::vector<std::string>& records) {
    const std::vector<absl::Span<const char>> spans(records.begin(), records.end());
    ASSERT_OK_AND_ASSIGN(const std::vector<uint64_t> offsets, files_->Append("x", spans));
    offsets_.insert(offsets_.end(), offsets.begin(), offsets.end());
  }
  std::string Path() const { return folder_ + "/x.record"; }

  const std::string folder_ = NewTestFolder();
  const std::unique_ptr<RecordFiles> files_ = *RecordFiles::Open(rocksdb::Env::Default(), folder_);
  const std::vector<std::string> data_ = {TestRecordData(1, 5000), TestRecordData(2, 4096), TestRecordData(3, 5000)};
  const std::vector<v1::RecordInfo> infos_ = {TestRecordInfo("x", 0, data_[0]), TestRecordInfo("x", 1, data_[1]),
                                              TestRecordInfo("x", 2, data_[2])};
  std::vector<uint64_t> offsets_;
};

TEST_F(SearchFileTest, RecordsAreFoundInAnyOrder) {
  Append({data_[2], data_[0]});
  Append({data_[1]});
  EXPECT_THAT(SearchFile(*files_, infos_),
              ElementsAre(Optional(offsets_[1]), Optional(offsets_[2]), Optional(offsets_[0])));
}

TEST_F(SearchFileTest, BehindOneThatIsDamagedOthersAreFound) {
  Append({data_[0], data_[1], data_[2]});
  std::string bytes = testing::ReadFile(Path());
  bytes[offsets_[0] + 4000] ^= 1;
  WriteFile(Path(), bytes);
  EXPECT_THAT(SearchFile(*files_, infos_), ElementsAre(absl::nullopt, Optional(offsets_[1]), Optional(offsets_[2])));
}

TEST_F(SearchFileTest, OneThatWasCutOrIsNotThereIsNotFound) {
  Append({data_[0], data_[2]});
  fs::resize_file(Path(), offsets_[1] + 4999);
  EXPECT_THAT(SearchFile(*files_, infos_), ElementsAre(Optional(offsets_[0]), absl::nullopt, absl::nullopt));
  fs::remove(Path());
  EXPECT_THAT(SearchFile(*files_, infos_), ElementsAre(absl::nullopt, absl::nullopt, absl::nullopt));
}

// --- In blob files ----------------------------------------------------------------------------------------------------

class LostRecordsTest : public ::testing::Test {
 protected:
  v1::RecordInfo Put(const std::string& snapshot_id, int layer, size_t bytes) {
    const std::string data = TestRecordData(static_cast<uint32_t>(layer), bytes);
    const v1::RecordInfo info = TestRecordInfo(snapshot_id, layer, data);
    EXPECT_OK(store_.records().Put(info, data));
    return info;
  }
  void Flush() {
    ASSERT_OK_AND_ASSIGN(const Database::Access access, store_.records_database().Read());
    for (const Family family : {Family::kRecordInfos, Family::kRecords}) {
      ASSERT_TRUE(access.db().Flush(rocksdb::FlushOptions(), access.family(family)).ok());
    }
  }

  TestStore store_;
};

TEST_F(LostRecordsTest, BlobsAreReadWithoutRocksdbAndDamageCostsThoseThatItTouches) {
  std::map<std::string, std::string> stored;
  for (int layer = 0; layer < 5; ++layer) {
    const v1::RecordInfo info = Put("x", layer, 6000 + layer);
    stored[RecordKey(info)] = TestRecordData(static_cast<uint32_t>(layer), info.bytes());
  }
  Flush();
  std::string path;
  for (const auto& entry : fs::directory_iterator(store_.data_dir() + "/records")) {
    if (entry.path().extension() == ".blob") path = entry.path().string();
  }
  ASSERT_FALSE(path.empty());
  const auto read = [](const std::string& file) {
    std::map<std::string, std::string> found;
    EXPECT_OK(ForEachBlob(*rocksdb::Env::Default(), file, [&](absl::string_view key, absl::string_view value) {
      found[std::string(key)] = std::string(value);
      return absl::OkStatus();
    }));
    return found;
  };
  EXPECT_EQ(read(path), stored);
  const std::string copy = NewTestFolder() + "/copy.blob";
  const std::string bytes = testing::ReadFile(path);
  // A file's header has 30 bytes, a blob's own 32, and its key here 10: in its lengths, its checksums, its key, its value.
  for (const size_t at : {size_t{30}, size_t{40}, size_t{56}, size_t{60}, size_t{64}, size_t{4000}}) {
    std::string damaged = bytes;
    damaged[at] ^= 4;
    WriteFile(copy, damaged);
    const std::map<std::string, std::string> found = read(copy);
    EXPECT_EQ(found.size(), 4u) << at;
    for (const auto& [key, value] : found) EXPECT_EQ(value, stored[key]) << at;
  }
  WriteFile(copy, bytes.substr(0, bytes.size() / 2));
  EXPECT_EQ(read(copy).size(), 2u);
  WriteFile(copy, bytes.substr(0, 20));
  EXPECT_EQ(read(copy).size(), 0u);
}

// --- By a store that starts -------------------------------------------------------------------------------------------

TEST_F(LostRecordsTest, RowsOfCommittedRecordsAreFoundInTheirFilesAndFilesOfNobodyGo) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(lease, "r", {1, 2}, {3}));
  v1::SnapshotManifest manifest;
  manifest.set_snapshot_id("committed");
  manifest.set_session_id("s");
  manifest.set_position(3);
  manifest.set_model_fingerprint(kTestModel);
  for (int layer = 0; layer < 3; ++layer) *manifest.add_records() = Put("committed", layer, kLarge);
  ASSERT_OK(store_.store().CommitSnapshot(lease, store_.LogBranch("s"), manifest));
  const v1::RecordInfo orphan = Put("nobody", 0, kLarge);
  ASSERT_OK(store_.records().MakeDurable());
  {
    ASSERT_OK_AND_ASSIGN(Database::Access access, store_.records_database().Read());
    rocksdb::WriteBatch batch;
    for (const v1::RecordInfo& info : manifest.records()) {
      batch.Delete(access.family(Family::kRecordInfos), RecordKey(info));
    }
    batch.Delete(access.family(Family::kRecordInfos), RecordKey(orphan));
    ASSERT_OK(store_.records_database().Write(std::move(access), batch, Durability::kSynced));
  }
  EXPECT_THAT(store_.records().Get(manifest.records(1)), StatusIs(StatusCode::kNotFound));
  ASSERT_OK(store_.Reopen());
  for (int layer = 0; layer < 3; ++layer) {
    EXPECT_THAT(store_.records().Get(manifest.records(layer)),
                IsOkAndHolds(TestRecordData(static_cast<uint32_t>(layer), kLarge)));
  }
  EXPECT_EQ(store_.records().bytes(), static_cast<int64_t>(3 * kLarge));
  EXPECT_FALSE(fs::exists(store_.data_dir() + "/records/files/nobody.record"));
}

}  // namespace
}  // namespace rwkv::state_store
