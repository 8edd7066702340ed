#include "services/state_store/records/rocksdb/rocksdb_record_store.h"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rocksdb/db.h"
#include "rocksdb/env.h"
#include "services/state_store/records/record_memory.h"
#include "services/state_store/records/rocksdb/record_files.h"
#include "services/state_store/testing/fault_file_system.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::AllOf;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::StatusIs;

class RocksdbRecordStoreTest : public ::testing::Test {
 protected:
  RecordStore& records() { return store_.records(); }
  v1::RecordInfo Put(const std::string& snapshot_id, int layer, const std::string& data) {
    const v1::RecordInfo info = TestRecordInfo(snapshot_id, layer, data);
    EXPECT_OK(records().Put(info, data));
    return info;
  }
  double CorruptRecords() { return store_.metrics().Counter("rwkv_state_store_corrupt_records_total", "").Value(); }
  void Flush() {
    ASSERT_OK_AND_ASSIGN(const Database::Access access, store_.records_database().Read());
    for (const Family family : {Family::kRecordInfos, Family::kRecords}) {
      ASSERT_TRUE(access.db().Flush(rocksdb::FlushOptions(), access.family(family)).ok());
    }
  }

  TestStore store_;
};

TEST_F(RocksdbRecordStoreTest, GivesBackTheBytesThatWerePut) {
  for (const size_t bytes : {size_t{1}, size_t{4095}, size_t{4096}, size_t{3} << 20}) {
    const std::string data = TestRecordData(static_cast<uint32_t>(bytes), bytes);
    const v1::RecordInfo info = Put(absl::StrCat("x", bytes), 3, data);
    EXPECT_THAT(records().Get(info), IsOkAndHolds(data));
    EXPECT_THAT(records().Check(info), IsOk());
  }
  Flush();
  const std::string data = TestRecordData(4096, 4096);
  EXPECT_THAT(records().Get(TestRecordInfo("x4096", 3, data)), IsOkAndHolds(data));
}

TEST_F(RocksdbRecordStoreTest, DataThatDiffersFromItsInfoIsRefused) {
  const std::string data = TestRecordData(1, 100);
  v1::RecordInfo info = TestRecordInfo("x", 0, data);
  info.set_bytes(99);
  EXPECT_THAT(records().Put(info, data),
              StatusIs(StatusCode::kDataLoss, AllOf(HasSubstr("record x/0"), HasSubstr("99"))));
  info = TestRecordInfo("x", 0, data);
  info.set_crc32c(info.crc32c() ^ 1);
  EXPECT_THAT(records().Put(info, data), StatusIs(StatusCode::kDataLoss, HasSubstr("CRC32C")));
  EXPECT_THAT(store_.RecordKeys(), IsEmpty());
}

TEST_F(RocksdbRecordStoreTest, RecordNeverChanges) {
  const std::string data = TestRecordData(1, 100), other = TestRecordData(2, 100);
  const v1::RecordInfo info = Put("x", 0, data);
  EXPECT_THAT(records().Put(info, data), IsOk());
  EXPECT_THAT(records().Put(TestRecordInfo("x", 0, other), other), StatusIs(StatusCode::kAlreadyExists));
  EXPECT_THAT(records().Get(info), IsOkAndHolds(data));
  EXPECT_EQ(records().bytes(), 100);
}

TEST_F(RocksdbRecordStoreTest, MissingAndDifferingRecordsAreTold) {
  const v1::RecordInfo info = Put("x", 0, TestRecordData(1, 100));
  v1::RecordInfo other = info;
  other.set_layer(1);
  EXPECT_THAT(records().Get(other), StatusIs(StatusCode::kNotFound, HasSubstr("record x/1")));
  EXPECT_THAT(records().Check(other), StatusIs(StatusCode::kDataLoss, HasSubstr("record x/1")));
  other = info;
  other.set_crc32c(info.crc32c() + 1);
  EXPECT_THAT(records().Get(other), StatusIs(StatusCode::kDataLoss));
  EXPECT_THAT(records().Check(other), StatusIs(StatusCode::kDataLoss));
  other = info;
  other.set_bytes(101);
  EXPECT_THAT(records().Check(other), StatusIs(StatusCode::kDataLoss, HasSubstr("101")));
  EXPECT_EQ(CorruptRecords(), 0);
}

TEST_F(RocksdbRecordStoreTest, DeleteTakesAllLayersOfOneSnapshot) {
  for (int layer = 0; layer < 3; ++layer) Put("x", layer, TestRecordData(1, 100));
  const v1::RecordInfo kept = Put("x.1", 0, TestRecordData(1, 100));
  Put("x-", 0, TestRecordData(1, 100));
  ASSERT_OK(records().Delete("x"));
  ASSERT_OK(records().Delete("x"));
  EXPECT_EQ(store_.RecordKeys().size(), 4u);
  EXPECT_EQ(records().bytes(), 200);
  EXPECT_THAT(records().Get(kept), IsOk());
}

TEST_F(RocksdbRecordStoreTest, BytesAreCounted) {
  const auto counter = [&](const char* name) { return store_.metrics().Counter(name, "").Value(); };
  const std::string data = TestRecordData(1, 100);
  const v1::RecordInfo info = Put("x", 0, data);
  Put("x", 0, data);  // Again is nothing.
  Put("x", 1, TestRecordData(2, 50));
  ASSERT_OK(records().Get(info));
  ASSERT_OK(records().Get(info));
  EXPECT_EQ(counter("rwkv_state_store_records_written_bytes_total"), 150);
  EXPECT_EQ(counter("rwkv_state_store_records_read_bytes_total"), 200);
  EXPECT_EQ(store_.metrics().Gauge("rwkv_state_store_records_bytes", "").Value(), 150);
  ASSERT_OK(store_.Reopen());
  EXPECT_EQ(store_.metrics().Gauge("rwkv_state_store_records_bytes", "").Value(), 150);
}

TEST_F(RocksdbRecordStoreTest, AgeIsThatOfTheNewestRecordWhateverItsLayer) {
  Put("x", 1, "a");
  store_.clock().Advance(absl::Seconds(1));
  Put("x", 0, "b");
  Put("x", 2, "c");
  store_.clock().Advance(absl::Seconds(1));
  Put("x", 3, "d");
  absl::Time newest;
  ASSERT_OK(records().ForEach([&](const RecordStore::Stored& stored) { newest = stored.newest_put; }));
  EXPECT_EQ(newest, store_.clock().Now());
}

TEST_F(RocksdbRecordStoreTest, EverySnapshotIsVisitedOnce) {
  for (int i = 0; i < 2100; ++i) {
    Put(absl::StrCat("x", i), 0, "a");
    store_.clock().Advance(absl::Seconds(1));
    Put(absl::StrCat("x", i), 1, "bc");
  }
  std::vector<RecordStore::Stored> all;
  ASSERT_OK(records().ForEach([&](const RecordStore::Stored& stored) { all.push_back(stored); }));
  ASSERT_EQ(all.size(), 2100u);
  for (size_t i = 1; i < all.size(); ++i) EXPECT_LT(all[i - 1].snapshot_id, all[i].snapshot_id);
  EXPECT_EQ(all[0].snapshot_id, "x0");
  EXPECT_EQ(all[0].bytes, 3u);
  EXPECT_EQ(all[0].newest_put, store_.clock().Now() - absl::Seconds(2099));
}

TEST_F(RocksdbRecordStoreTest, ChangedBytesAreDataLossAndCounted) {
  const v1::RecordInfo info = Put("x", 0, TestRecordData(1, 10000));
  // A wrong value under the right key: only our own checksum can tell.
  {
    ASSERT_OK_AND_ASSIGN(Database::Access access, store_.records_database().Read());
    std::string wrong = TestRecordData(1, 10000);
    wrong[5000] ^= 1;
    std::string key("x\0\0\0\0\0\0\0\0\0", 10);
    rocksdb::WriteBatch batch;
    batch.Put(access.family(Family::kRecords), key, wrong);
    ASSERT_OK(store_.records_database().Write(std::move(access), batch, Durability::kSynced));
  }
  EXPECT_THAT(records().Get(info),
              StatusIs(StatusCode::kDataLoss, AllOf(HasSubstr("record x/0"), HasSubstr("CRC32C"))));
  EXPECT_EQ(CorruptRecords(), 1);
}

TEST_F(RocksdbRecordStoreTest, FlippedBitOnTheDiskIsDataLoss) {
  const std::string data = TestRecordData(1, 10000), sound = TestRecordData(2, 10000);
  const v1::RecordInfo info = Put("x", 0, data), sound_info = Put("y", 0, sound);
  Flush();
  int found = 0;
  for (const auto& entry : std::filesystem::directory_iterator(store_.data_dir() + "/records")) {
    if (entry.path().extension() != ".blob") continue;
    std::ifstream in(entry.path(), std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    const size_t at = bytes.find(data);
    if (at == std::string::npos) continue;
    ++found;
    std::fstream out(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    out.seekp(static_cast<std::streamoff>(at + 5000));
    out.put(static_cast<char>(bytes[at + 5000] ^ 0x10));
  }
  ASSERT_EQ(found, 1);
  ASSERT_OK(store_.Reopen());
  EXPECT_THAT(records().Get(info), StatusIs(StatusCode::kDataLoss, HasSubstr("record x/0")));
  EXPECT_EQ(CorruptRecords(), 1);
  EXPECT_THAT(records().Get(sound_info), IsOkAndHolds(sound));
}

TEST_F(RocksdbRecordStoreTest, DeletedRecordsGiveTheirSpaceBack) {
  // 640 snapshots of 100 KiB, of which few live at any time.
  for (uint32_t i = 0; i < 640; ++i) {
    Put(absl::StrCat("x", i), 0, TestRecordData(i, 100 << 10));
    if (i >= 40) ASSERT_OK(records().Delete(absl::StrCat("x", i - 40)));
    if (i % 80 == 79) Flush();
  }
  {
    ASSERT_OK_AND_ASSIGN(const Database::Access access, store_.records_database().Read());
    ASSERT_TRUE(access.db()
                    .CompactRange(rocksdb::CompactRangeOptions(), access.family(Family::kRecords), nullptr, nullptr)
                    .ok());
  }
  ASSERT_OK(store_.Reopen());  // Which removes files that nothing refers to.
  uintmax_t bytes = 0;
  for (const auto& entry : std::filesystem::directory_iterator(store_.data_dir() + "/records")) {
    if (entry.path().extension() == ".blob") bytes += entry.file_size();
  }
  EXPECT_LE(bytes, uintmax_t{12} << 20);
  EXPECT_THAT(records().Get(TestRecordInfo("x639", 0, TestRecordData(639, 100 << 10))), IsOk());
}

// --- Large records, in files ---------------------------------------------------------------------------------------

constexpr size_t kLarge = RocksdbRecordStore::kFileBytes;

class RecordFilesTest : public RocksdbRecordStoreTest {
 protected:
  static absl::StatusOr<uint64_t> AppendOne(RecordFiles& files, const std::string& snapshot_id,
                                            const std::string& record) {
    const absl::Span<const char> data(record);
    const auto offsets = files.Append(snapshot_id, {&data, 1});
    if (!offsets.ok()) return offsets.status();
    return offsets->at(0);
  }
  std::string Path(const std::string& snapshot_id) {
    return absl::StrCat(store_.data_dir(), "/records/files/", snapshot_id, ".record");
  }
  // Whole blocks a record, or just its bytes where the file system knows none.
  static testing::Matcher<uintmax_t> HoldsRecords(const std::vector<std::string>& records) {
    size_t bytes = 0, blocks = 0;
    for (const std::string& record : records) {
      bytes += record.size();
      blocks += WholeBlocks(record.size());
    }
    return testing::AnyOf(bytes, blocks);
  }
};

TEST_F(RecordFilesTest, LayersOfASnapshotShareAFileThatGoesWithThem) {
  const std::string first = TestRecordData(1, kLarge), second = TestRecordData(2, 2 * kLarge + 1), small = "abc";
  const v1::RecordInfo infos[] = {Put("x:1", 0, first), Put("x:1", 1, second), Put("x:1", 2, small)};
  EXPECT_THAT(std::filesystem::file_size(Path("x:1")), HoldsRecords({first, second}));
  for (int round = 0; round < 2; ++round) {
    EXPECT_THAT(records().Get(infos[0]), IsOkAndHolds(first));
    EXPECT_THAT(records().Get(infos[1]), IsOkAndHolds(second));
    EXPECT_THAT(records().Get(infos[2]), IsOkAndHolds(small));
    ASSERT_OK(records().MakeDurable());
    ASSERT_OK(store_.Reopen());
  }
  // Again is nothing, other bytes are refused, and a layer may come later.
  EXPECT_THAT(records().Put(infos[0], first), IsOk());
  EXPECT_THAT(std::filesystem::file_size(Path("x:1")), HoldsRecords({first, second}));
  EXPECT_THAT(records().Put(TestRecordInfo("x:1", 0, second), second), StatusIs(StatusCode::kAlreadyExists));
  const v1::RecordInfo late = Put("x:1", 3, second);
  EXPECT_THAT(records().Get(late), IsOkAndHolds(second));
  EXPECT_THAT(records().Get(infos[1]), IsOkAndHolds(second));
  EXPECT_EQ(records().bytes(), first.size() + 2 * second.size() + small.size());
  ASSERT_OK(records().Delete("x:1"));
  EXPECT_FALSE(std::filesystem::exists(Path("x:1")));
  EXPECT_THAT(records().Get(infos[0]), StatusIs(StatusCode::kNotFound));
  EXPECT_EQ(records().bytes(), 0);
  ASSERT_OK(records().MakeDurable());
  EXPECT_THAT(records().Get(Put("x:1", 0, second)), IsOkAndHolds(second));
}

TEST_F(RecordFilesTest, ARecordMayBeginAndEndAnywhereInAFile) {
  const std::string folder = NewTestFolder();
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RecordFiles> files, RecordFiles::Open(rocksdb::Env::Default(), folder));
  // By a build that did not write whole blocks.
  const std::string old = TestRecordData(1, kLarge + 1), next = TestRecordData(2, kLarge), last = TestRecordData(3, 5);
  std::ofstream(folder + "/x.record", std::ios::binary) << old;
  std::vector<std::string> lost;
  const auto read = [&](uint64_t offset, size_t bytes, absl::Span<char> to) {
    const absl::Status status = files->Read("x", offset, bytes, to);
    return status.ok() ? std::string(to.data(), bytes) : status.ToString();
  };
  for (int round = 0; round < 2; ++round) {
    ASSERT_OK_AND_ASSIGN(const uint64_t next_at, AppendOne(*files, "x", next));
    ASSERT_OK_AND_ASSIGN(const uint64_t last_at, AppendOne(*files, "x", last));
    EXPECT_THAT(next_at, testing::Ge(old.size()));
    ASSERT_OK(files->Sync(&lost));  // The next round opens it again.
    // Into memory that is as long, too short for whole blocks, of whole blocks, and not aligned.
    const RecordMemory memory = NewRecordMemory(2 * WholeBlocks(old.size()));
    for (const size_t room : {old.size(), WholeBlocks(old.size())}) {
      for (const size_t begin : {0, 1}) {
        const absl::Span<char> to = absl::MakeSpan(memory.get() + begin, room);
        EXPECT_EQ(read(0, old.size(), to), old);
        EXPECT_EQ(read(next_at, next.size(), to), next);
        EXPECT_EQ(read(last_at, last.size(), to), last);
      }
    }
  }
}

TEST_F(RecordFilesTest, RecordsOfOneCallAreOneWriteAndEachIsWhole) {
  constexpr size_t kSizes[] = {2 * kLarge, kLarge + 1, 100, kLarge, kLarge};
  const RecordMemory memory = NewRecordMemory(8 * kLarge);
  size_t begin = 0;
  std::vector<std::string> records_data;
  std::vector<v1::RecordInfo> infos;
  std::vector<absl::Span<const char>> data;
  for (const size_t bytes : kSizes) {
    const int layer = static_cast<int>(infos.size());
    records_data.push_back(TestRecordData(static_cast<uint32_t>(layer), bytes));
    std::copy(records_data.back().begin(), records_data.back().end(), memory.get() + begin);
    infos.push_back(TestRecordInfo("x", layer, records_data.back()));
    data.emplace_back(memory.get() + begin, bytes);
    begin += WholeBlocks(bytes);
  }
  // The last two lie as they will in the file, the others do not.
  const std::vector<absl::Span<const char>> last(data.begin() + 3, data.end());
  ASSERT_OK(records().PutAll(absl::MakeConstSpan(infos).subspan(3), last));
  ASSERT_OK(records().PutAll(infos, data));
  ASSERT_OK(records().PutAll(infos, data)) << "again";
  EXPECT_EQ(records().bytes(), 5 * kLarge + 101);
  for (int round = 0; round < 2; ++round) {
    for (size_t i = 0; i < infos.size(); ++i) EXPECT_THAT(records().Get(infos[i]), IsOkAndHolds(records_data[i])) << i;
    ASSERT_OK(store_.Reopen());
  }
  // One that is wrong, or another's: none is put.
  infos[1].set_crc32c(infos[1].crc32c() ^ 1);
  for (v1::RecordInfo& info : infos) info.set_snapshot_id("y");
  EXPECT_THAT(records().PutAll(infos, data), StatusIs(StatusCode::kDataLoss, HasSubstr("record y/1")));
  EXPECT_THAT(records().Check(infos[0]), StatusIs(StatusCode::kDataLoss));
}

TEST_F(RecordFilesTest, AFileSystemThatOnlyHasAPageCacheWillDo) {
  class Cached : public rocksdb::EnvWrapper {
   public:
    Cached() : EnvWrapper(rocksdb::Env::Default()) {}
    const char* Name() const override { return "Cached"; }
    rocksdb::Status NewWritableFile(const std::string& path, std::unique_ptr<rocksdb::WritableFile>* file,
                                    const rocksdb::EnvOptions& options) override {
      if (options.use_direct_writes) return rocksdb::Status::NotSupported("direct");
      return target()->NewWritableFile(path, file, options);
    }
    rocksdb::Status ReopenWritableFile(const std::string& path, std::unique_ptr<rocksdb::WritableFile>* file,
                                       const rocksdb::EnvOptions& options) override {
      if (options.use_direct_writes) return rocksdb::Status::NotSupported("direct");
      return target()->ReopenWritableFile(path, file, options);
    }
    rocksdb::Status NewRandomAccessFile(const std::string& path, std::unique_ptr<rocksdb::RandomAccessFile>* file,
                                        const rocksdb::EnvOptions& options) override {
      if (options.use_direct_reads) return rocksdb::Status::NotSupported("direct");
      return target()->NewRandomAccessFile(path, file, options);
    }
  } env;
  const std::string folder = NewTestFolder();
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RecordFiles> files, RecordFiles::Open(&env, folder));
  std::vector<std::string> lost;
  for (const std::string& record : {TestRecordData(1, 2 * kRecordAlignment), TestRecordData(2, kLarge + 1)}) {
    ASSERT_OK_AND_ASSIGN(const uint64_t at, AppendOne(*files, "x", record));
    ASSERT_OK(files->Sync(&lost));
    std::string found(record.size(), ' ');
    EXPECT_OK(files->Read("x", at, found.size(), absl::MakeSpan(found)));
    EXPECT_EQ(found, record);
  }
  EXPECT_EQ(std::filesystem::file_size(folder + "/x.record"), 2 * kRecordAlignment + kLarge + 1);
}

TEST_F(RecordFilesTest, AFileThatWasChangedCutOrRemovedIsDataLoss) {
  const std::string data = TestRecordData(1, kLarge);
  const v1::RecordInfo infos[] = {Put("x", 0, data), Put("x", 1, data)};
  ASSERT_OK(records().MakeDurable());
  {
    std::fstream out(Path("x"), std::ios::in | std::ios::out | std::ios::binary);
    out.seekp(1000);
    out.put(static_cast<char>(data[1000] ^ 1));
  }
  EXPECT_THAT(records().Get(infos[0]), StatusIs(StatusCode::kDataLoss, HasSubstr("CRC32C")));
  EXPECT_THAT(records().Get(infos[1]), IsOkAndHolds(data));
  std::filesystem::resize_file(Path("x"), 2 * kLarge - 1);
  EXPECT_THAT(records().Get(infos[1]), StatusIs(StatusCode::kDataLoss, HasSubstr("only")));
  std::filesystem::remove(Path("x"));
  EXPECT_THAT(records().Get(infos[1]), StatusIs(StatusCode::kDataLoss, HasSubstr("gone")));
  EXPECT_EQ(CorruptRecords(), 3);
  ASSERT_OK(store_.Reopen());
  EXPECT_THAT(records().Get(infos[1]), StatusIs(StatusCode::kDataLoss));
  EXPECT_OK(records().Delete("x"));
}

TEST_F(RecordFilesTest, FilesThatBelongToNoRecordAreRemovedAtStart) {
  const v1::RecordInfo info = Put("x", 0, TestRecordData(1, kLarge));
  std::ofstream(Path("y")) << "what a crash left";
  ASSERT_OK(store_.Reopen());
  EXPECT_FALSE(std::filesystem::exists(Path("y")));
  EXPECT_THAT(records().Get(info), IsOk());
}

TEST_F(RecordFilesTest, AFullDiskIsToldAndWhatCameBeforeAndAfterIsWhole) {
  const auto file_system = std::make_shared<FaultFileSystem>();
  const std::unique_ptr<rocksdb::Env> env = rocksdb::NewCompositeEnv(file_system);
  const std::string folder = NewTestFolder();
  const auto files = RecordFiles::Open(env.get(), folder);
  ASSERT_THAT(files, IsOk());
  const std::string first = TestRecordData(1, 1000), second = TestRecordData(2, 2000);
  ASSERT_OK_AND_ASSIGN(const uint64_t first_at, AppendOne(**files, "x", first));
  file_system->FailWritesWith(rocksdb::IOStatus::NoSpace("full"));
  EXPECT_THAT(AppendOne(**files, "x", second), StatusIs(StatusCode::kResourceExhausted, HasSubstr("full")));
  EXPECT_THAT(AppendOne(**files, "y", second), StatusIs(StatusCode::kResourceExhausted));
  file_system->FailWritesWith(rocksdb::IOStatus::OK());
  ASSERT_OK_AND_ASSIGN(const uint64_t second_at, AppendOne(**files, "x", second));
  EXPECT_GT(second_at, first_at + first.size()) << "behind the half that was written";
  std::vector<std::string> lost;
  EXPECT_OK((*files)->Sync(&lost));
  EXPECT_THAT(lost, testing::IsEmpty());
  std::string read(first.size(), ' ');
  ASSERT_OK((*files)->Read("x", first_at, read.size(), absl::MakeSpan(read)));
  EXPECT_EQ(read, first);
  read.resize(second.size());
  ASSERT_OK((*files)->Read("x", second_at, read.size(), absl::MakeSpan(read)));
  EXPECT_EQ(read, second);
}

TEST_F(RecordFilesTest, ADamagedDatabaseOfRecordsKeepsTheFilesOfThoseItStillKnows) {
  const std::string data = TestRecordData(1, kLarge);
  const v1::RecordInfo info = Put("x", 0, data);
  ASSERT_OK(records().MakeDurable());
  Flush();
  const v1::RecordInfo small = Put("y", 0, "abc");
  Flush();
  // A file of small records is gone, so that the database does not open.
  for (const auto& entry : std::filesystem::directory_iterator(store_.data_dir() + "/records")) {
    if (entry.path().filename().string().substr(0, 8) == "MANIFEST") std::filesystem::resize_file(entry.path(), 40);
  }
  ASSERT_OK(store_.Reopen());
  EXPECT_THAT(records().Get(info), testing::AnyOf(IsOkAndHolds(data), StatusIs(StatusCode::kNotFound)));
  EXPECT_THAT(records().Get(Put("z", 0, data)), IsOkAndHolds(data));
}

TEST_F(RocksdbRecordStoreTest, EqualRecordsPutAtOnceAreCountedOnce) {
  const std::string data = TestRecordData(1, 100000);
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] { EXPECT_OK(records().Put(TestRecordInfo("x", 0, data), data)); });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(records().bytes(), 100000);
}

}  // namespace
}  // namespace rwkv::state_store
