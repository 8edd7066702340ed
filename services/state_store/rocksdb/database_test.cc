#include "services/state_store/rocksdb/database.h"

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rocksdb/env.h"
#include "services/common/metrics.h"
#include "services/state_store/testing/background.h"
#include "services/state_store/testing/fault_file_system.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/other_user.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::AllOf;
using testing::HasSubstr;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::Not;
using testing::StatusIs;

class DatabaseTest : public ::testing::Test {
 protected:
  DatabaseTest()
      : file_system_(std::make_shared<FaultFileSystem>()),
        env_(rocksdb::NewCompositeEnv(file_system_)),
        metrics_(*common::Metrics::Create("")) {
    options_.data_dir = NewTestFolder() + "/data";
    options_.env = env_.get();
    options_.resume_interval = absl::ZeroDuration();
  }

  absl::Status Open() {
    database_.reset();
    absl::StatusOr<std::unique_ptr<Database>> database = Database::Open(options_, metrics_.get());
    if (database.ok()) database_ = *std::move(database);
    return database.status();
  }

  static absl::Status Put(Database& database, const std::string& key, const std::string& value,
                          Durability durability = Durability::kSynced) {
    absl::StatusOr<Database::Access> access = database.Read();
    if (!access.ok()) return access.status();
    rocksdb::WriteBatch batch;
    batch.Put(access->family(Family::kCatalog), key, value);
    return database.Write(*std::move(access), batch, durability);
  }
  absl::Status Put(const std::string& key, const std::string& value) { return Put(*database_, key, value); }

  static absl::StatusOr<std::string> Get(Database& database, const std::string& key) {
    const absl::StatusOr<Database::Access> access = database.Read();
    if (!access.ok()) return access.status();
    std::string value;
    const rocksdb::Status status =
        access->db().Get(rocksdb::ReadOptions(), access->family(Family::kCatalog), key, &value);
    if (status.IsNotFound()) return absl::NotFoundError(key);
    if (!status.ok()) return absl::UnknownError(status.ToString());
    return value;
  }
  absl::StatusOr<std::string> Get(const std::string& key) { return Get(*database_, key); }

  // As a kill of the process does: what it has written is all in its files. The next Open() finds that.
  void Die() {
    const std::string died = NewTestFolder() + "/data";
    std::filesystem::copy(options_.data_dir, died);
    options_.data_dir = died;
    database_.reset();
  }

  const std::shared_ptr<FaultFileSystem> file_system_;
  const std::unique_ptr<rocksdb::Env> env_;
  const std::unique_ptr<common::Metrics> metrics_;
  Database::Options options_;
  std::unique_ptr<Database> database_;
};

// --- What is known of the log ----------------------------------------------------------------------------------------

TEST_F(DatabaseTest, ALogIsWholeAfterAKillOrAStopAndNotWhenItWasCut) {
  const auto put = [this](const std::string& key, Durability durability) {
    ASSERT_OK_AND_ASSIGN(Database::Access access, database_->Read());
    rocksdb::WriteBatch batch;
    batch.Put(access.family(Family::kRecordInfos), key, "v");
    ASSERT_OK(database_->Write(std::move(access), batch, durability));
  };
  ASSERT_OK(Open());
  EXPECT_FALSE(database_->log_is_whole()) << "nobody has said what is in it";
  database_->TrustLog();
  put("synced", Durability::kSynced);
  put("buffered", Durability::kBuffered);
  Die();
  const std::string killed = options_.data_dir;
  for (const char* damage : {"none", "cut", "no journal"}) {
    SCOPED_TRACE(damage);
    options_.data_dir = NewTestFolder() + "/data";
    std::filesystem::copy(killed, options_.data_dir);
    for (const auto& entry : std::filesystem::directory_iterator(options_.data_dir)) {
      const std::string name = entry.path().filename().string();
      const bool is_log = entry.path().extension() == ".log" && entry.file_size() > 0;
      if (damage == std::string("cut") && is_log) std::filesystem::resize_file(entry.path(), entry.file_size() - 1);
      if (damage == std::string("no journal") && name.rfind("ACKNOWLEDGED-", 0) == 0) {
        std::filesystem::remove(entry.path());
      }
    }
    const bool whole = damage == std::string("none");
    for (int opening = 0; opening < 2; ++opening) {  // It stays so until somebody trusts it.
      ASSERT_OK(Open());
      EXPECT_EQ(database_->log_is_whole(), whole && opening == 0);
      database_.reset();
    }
    ASSERT_OK(Open());
    database_->TrustLog();
    put("later", Durability::kBuffered);
    ASSERT_OK(Open());
    EXPECT_TRUE(database_->log_is_whole()) << "stopped";
  }
}

// --- At start -------------------------------------------------------------------------------------------------------

TEST_F(DatabaseTest, FolderIsMadeAndFoundAgain) {
  options_.data_dir += "/deeper/still";
  ASSERT_OK(Open());
  ASSERT_OK(Put("k", "v"));
  ASSERT_OK(Open());
  EXPECT_THAT(Get("k"), IsOkAndHolds(std::string("v")));
}

TEST_F(DatabaseTest, FileInPlaceOfTheFolderIsNamed) {
  std::ofstream(options_.data_dir) << "x";
  EXPECT_THAT(Open(), StatusIs(StatusCode::kFailedPrecondition,
                               AllOf(HasSubstr(options_.data_dir), HasSubstr("is not a directory"))));
  const std::string file = options_.data_dir;
  options_.data_dir += "/below";
  EXPECT_THAT(Open(), StatusIs(StatusCode::kFailedPrecondition, HasSubstr(file + " is not a directory")));
}

TEST_F(DatabaseTest, FolderThatAnotherHasOpenIsRefused) {
  ASSERT_OK(Open());
  EXPECT_THAT(Database::Open(options_, metrics_.get()),
              StatusIs(StatusCode::kUnavailable, AllOf(HasSubstr(options_.data_dir), HasSubstr("in use by another"))));
}

TEST_F(DatabaseTest, FullOrReadOnlyDiskIsNamedAtStart) {
  file_system_->FailWritesWith(rocksdb::IOStatus::NoSpace("No space left on device"));
  EXPECT_THAT(Open(), StatusIs(StatusCode::kResourceExhausted, HasSubstr(options_.data_dir)));
  std::filesystem::create_directories(options_.data_dir);
  EXPECT_THAT(Open(),
              StatusIs(StatusCode::kResourceExhausted, AllOf(HasSubstr(options_.data_dir), HasSubstr("not writable"))));
  file_system_->FailWritesWith(rocksdb::IOStatus::IOError("Read-only file system"));
  EXPECT_THAT(Open(), StatusIs(StatusCode::kUnavailable, AllOf(HasSubstr(options_.data_dir), HasSubstr("Read-only"))));
}

TEST_F(DatabaseTest, FolderWithoutWritePermissionIsNamed) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const std::string folder = rwkv::testing::MakeOpenFolder();
  options_.env = nullptr;
  const auto open = [this](const std::string& data_dir) {
    rwkv::testing::BecomeNobody();
    options_.data_dir = data_dir;
    std::cerr << Open();
    std::exit(0);
  };
  std::filesystem::create_directories(folder + "/closed");
  std::filesystem::permissions(folder + "/closed", std::filesystem::perms(0555));
  EXPECT_EXIT(open(folder + "/open"), ::testing::ExitedWithCode(0), "OK");
  EXPECT_EXIT(open(folder + "/closed"), ::testing::ExitedWithCode(0), "UNAVAILABLE.*/closed.*writable");
  std::filesystem::remove_all(folder);
}

TEST_F(DatabaseTest, MessagesAreOneLine) {
  ASSERT_OK(Open());
  database_.reset();
  std::ofstream(options_.data_dir + "/CURRENT") << "nonsense\nand more\n";
  const absl::Status status = Open();
  EXPECT_THAT(status, Not(IsOk()));
  EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr(options_.data_dir), Not(HasSubstr("\n"))));
}

TEST_F(DatabaseTest, ListOfFilesThatCurrentNamesAndIsNotThereIsDataLoss) {
  ASSERT_OK(Open());
  database_.reset();
  for (const char* damaged : {"MANIFEST-999999\n", "MANIFEST-0\x01\n04\n", "NANIFEST-000004\n", ".\n"}) {
    std::ofstream(options_.data_dir + "/CURRENT") << damaged;
    const absl::Status status = Open();
    EXPECT_THAT(status, StatusIs(StatusCode::kDataLoss,
                                 AllOf(HasSubstr(options_.data_dir), HasSubstr("CURRENT"), HasSubstr("not there"))));
    for (const char c : status.message()) EXPECT_TRUE(absl::ascii_isprint(static_cast<unsigned char>(c))) << status;
  }
}

TEST_F(DatabaseTest, DamageInTheMiddleOfTheLogIsDataLossAndNotItsEnd) {
  ASSERT_OK(Open());
  for (int i = 0; i < 100; ++i) ASSERT_OK(Put(absl::StrCat("k", i), std::string(1000, 'v')));
  Die();
  int damaged = 0;
  for (const auto& entry : std::filesystem::directory_iterator(options_.data_dir)) {
    if (entry.path().extension() != ".log" || entry.file_size() < 50000) continue;
    std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(20000);
    file << "XXXX";
    ++damaged;
  }
  ASSERT_EQ(damaged, 1);
  EXPECT_THAT(Open(), StatusIs(StatusCode::kDataLoss, AllOf(HasSubstr(options_.data_dir), HasSubstr("corrupt"))));
}

TEST_F(DatabaseTest, TornWriteAtTheEndOfTheLogIsForgotten) {
  ASSERT_OK(Open());
  ASSERT_OK(Put("k", "v"));
  Die();
  for (const auto& entry : std::filesystem::directory_iterator(options_.data_dir)) {
    if (entry.path().extension() != ".log" || entry.file_size() == 0) continue;
    std::ofstream(entry.path(), std::ios::app | std::ios::binary)
        << std::string("\x12\x34\x56\x78\xff\x00\x01half", 11);
  }
  ASSERT_OK(Open());
  EXPECT_THAT(Get("k"), IsOkAndHolds(std::string("v")));
}

TEST_F(DatabaseTest, NewerFormatIsRefused) {
  ASSERT_OK(Open());
  {
    ASSERT_OK_AND_ASSIGN(Database::Access access, database_->Read());
    rocksdb::WriteBatch batch;
    batch.Put(access.family(Family::kMeta), "format_version", "3");
    ASSERT_OK(database_->Write(std::move(access), batch, Durability::kSynced));
  }
  EXPECT_THAT(Open(), StatusIs(StatusCode::kFailedPrecondition, HasSubstr("format 3")));
}

// --- Durability -----------------------------------------------------------------------------------------------------

TEST_F(DatabaseTest, ConcurrentWritesShareFsyncs) {
  ASSERT_OK(Open());
  file_system_->SlowSyncs(absl::Milliseconds(2));
  constexpr int kThreads = 16, kWrites = 20;
  const uint64_t syncs_before = database_->wal_syncs(), writes_before = database_->synced_writes();
  std::vector<std::thread> threads;
  std::atomic<int> failed{0};
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      for (int j = 0; j < kWrites; ++j) failed += !Put(absl::StrCat(i, ".", j), "v").ok();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failed, 0);
  EXPECT_EQ(database_->synced_writes() - writes_before, uint64_t{kThreads} * kWrites);
  const uint64_t syncs = database_->wal_syncs() - syncs_before;
  EXPECT_GE(syncs, 1u);
  // With 16 writers that wait for one disk, groups are large; a quarter leaves room for a slow machine.
  EXPECT_LT(syncs, uint64_t{kThreads} * kWrites / 4);
}

TEST_F(DatabaseTest, AcknowledgedWritesSurviveACrashOfTheMachine) {
  ASSERT_OK(Open());
  constexpr int kThreads = 4;
  std::atomic<int> acknowledged[kThreads] = {};
  Background background;
  for (int i = 0; i < kThreads; ++i) {
    background.Run([&, i] {
      for (int j = 0; !background.ending(); ++j) {
        if (!Put(absl::StrCat(i, ".", j), "v").ok()) return;
        acknowledged[i] = j + 1;
      }
    });
  }
  for (int crash = 0; crash < 5; ++crash) {
    const int start = acknowledged[0];
    ASSERT_TRUE(Eventually([&] { return acknowledged[0] >= start + 10; }))
        << "of 10 writes came " << acknowledged[0] - start;
    int before[kThreads];
    for (int i = 0; i < kThreads; ++i) before[i] = acknowledged[i];
    Database::Options image = options_;
    image.env = nullptr;
    image.data_dir = NewTestFolder() + "/image";
    file_system_->CopyAsAfterCrash(options_.data_dir, image.data_dir);
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Database> after, Database::Open(image, metrics_.get()));
    for (int i = 0; i < kThreads; ++i) {
      for (int j = 0; j < before[i]; ++j) EXPECT_THAT(Get(*after, absl::StrCat(i, ".", j)), IsOk()) << crash;
    }
  }
  background.End();
}

TEST_F(DatabaseTest, BufferedWritesAreDurableAfterSync) {
  ASSERT_OK(Open());
  ASSERT_OK(Put(*database_, "buffered", "v", Durability::kBuffered));
  const auto image = [&](const std::string& key) -> absl::Status {
    Database::Options options = options_;
    options.env = nullptr;
    options.data_dir = NewTestFolder() + "/image";
    file_system_->CopyAsAfterCrash(options_.data_dir, options.data_dir);
    absl::StatusOr<std::unique_ptr<Database>> database = Database::Open(options, metrics_.get());
    if (!database.ok()) return database.status();
    return Get(**database, key).status();
  };
  EXPECT_THAT(image("buffered"), StatusIs(StatusCode::kNotFound));
  ASSERT_OK(database_->Sync());
  EXPECT_THAT(image("buffered"), IsOk());
}

// --- A disk that fails and comes back -------------------------------------------------------------------------------

TEST_F(DatabaseTest, FullDiskRefusesWritesServesReadsAndIsGotOver) {
  ASSERT_OK(Open());
  ASSERT_OK(Put("before", "v"));
  file_system_->FailWritesWith(rocksdb::IOStatus::NoSpace("No space left on device"));
  for (int i = 0; i < 3; ++i) {
    EXPECT_THAT(Put("during", "v"), StatusIs(StatusCode::kResourceExhausted, HasSubstr(options_.data_dir)));
  }
  EXPECT_THAT(Get("before"), IsOkAndHolds(std::string("v")));
  EXPECT_THAT(Get("during"), StatusIs(StatusCode::kNotFound));
  file_system_->FailWritesWith(rocksdb::IOStatus::OK());
  EXPECT_THAT(Put("after", "v"), IsOk());
  ASSERT_OK(Open());
  EXPECT_THAT(Get("before"), IsOk());
  EXPECT_THAT(Get("after"), IsOk());
}

TEST_F(DatabaseTest, FailuresAndWhatCameAfterThemAreCounted) {
  const auto failures = [&](const char* cause) {
    return metrics_->Counter("rwkv_state_store_write_failures_total", "", {{"cause", cause}}).Value();
  };
  const auto writable = [&] { return metrics_->Gauge("rwkv_state_store_writable", "").Value(); };
  const auto resumes = [&] { return metrics_->Counter("rwkv_state_store_resumes_total", "").Value(); };
  ASSERT_OK(Open());
  EXPECT_EQ(writable(), 1);
  file_system_->FailWritesWith(rocksdb::IOStatus::NoSpace("No space left on device"));
  EXPECT_FALSE(Put("k", "v").ok());
  EXPECT_EQ(writable(), 0);
  EXPECT_EQ(failures("no_space"), 1);
  EXPECT_EQ(failures("io"), 0);
  file_system_->FailWritesWith(rocksdb::IOStatus::OK());
  ASSERT_OK(database_->TryResume());
  EXPECT_EQ(writable(), 1);
  EXPECT_EQ(resumes(), 1);
  file_system_->FailWritesWith(rocksdb::IOStatus::IOError("Input/output error"));
  EXPECT_FALSE(Put("k", "v").ok());
  EXPECT_EQ(failures("io"), 1);
  EXPECT_EQ(failures("no_space"), 1);
}

TEST_F(DatabaseTest, FailedFsyncIsGotOver) {
  ASSERT_OK(Open());
  for (int round = 0; round < 3; ++round) {
    ASSERT_OK(Put(absl::StrCat("before", round), "v"));
    file_system_->FailWritesWith(rocksdb::IOStatus::IOError("Input/output error"));
    EXPECT_THAT(Put("during", "v"), StatusIs(StatusCode::kUnavailable, HasSubstr(options_.data_dir)));
    EXPECT_THAT(Put("during", "v"), StatusIs(StatusCode::kUnavailable));
    file_system_->FailWritesWith(rocksdb::IOStatus::OK());
    EXPECT_THAT(database_->TryResume(), IsOk());
    EXPECT_THAT(Put(absl::StrCat("after", round), "v"), IsOk());
  }
  ASSERT_OK(Open());
  for (int round = 0; round < 3; ++round) {
    EXPECT_THAT(Get(absl::StrCat("before", round)), IsOk());
    EXPECT_THAT(Get(absl::StrCat("after", round)), IsOk());
  }
}

TEST_F(DatabaseTest, ResumingIsTriedAtItsInterval) {
  options_.resume_interval = absl::Hours(1);
  ASSERT_OK(Open());
  file_system_->FailWritesWith(rocksdb::IOStatus::NoSpace("No space left on device"));
  EXPECT_THAT(Put("k", "v"), StatusIs(StatusCode::kResourceExhausted));
  EXPECT_THAT(Put("k", "v"), StatusIs(StatusCode::kResourceExhausted));  // The first try.
  file_system_->FailWritesWith(rocksdb::IOStatus::OK());
  EXPECT_THAT(Put("k", "v"), StatusIs(StatusCode::kResourceExhausted));  // Too soon for another.
}

TEST_F(DatabaseTest, WritersAndReadersLiveThroughFailuresAndReopenings) {
  ASSERT_OK(Open());
  std::atomic<int> acknowledged[3] = {};
  Background background;
  for (int i = 0; i < 3; ++i) {
    background.Run([&, i] {
      for (int j = 0; !background.ending();) {
        if (Put(absl::StrCat(i, ".", j), "v").ok()) acknowledged[i] = ++j;
        Get(absl::StrCat(i, ".0")).status().IgnoreError();
      }
    });
  }
  const auto five_more = [&] {
    const int start = acknowledged[0];
    return Eventually([&] { return acknowledged[0] >= start + 5; });
  };
  for (int round = 0; round < 6; ++round) {
    ASSERT_TRUE(five_more()) << "writing does not go on in round " << round;
    file_system_->FailWritesWith(round % 2 == 0 ? rocksdb::IOStatus::IOError("Input/output error")
                                                : rocksdb::IOStatus::NoSpace("No space left on device"));
    ASSERT_TRUE(Eventually([&] { return !Put("main", "v").ok(); })) << "a disk that fails takes writes";
    file_system_->FailWritesWith(rocksdb::IOStatus::OK());
  }
  ASSERT_TRUE(five_more()) << "writing does not go on after the last failure";
  background.End();
  ASSERT_OK(Open());
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < acknowledged[i]; ++j) EXPECT_THAT(Get(absl::StrCat(i, ".", j)), IsOk());
  }
}

}  // namespace
}  // namespace rwkv::state_store
