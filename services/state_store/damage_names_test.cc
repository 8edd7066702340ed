// Which sessions damage has touched is said: at the start of a store whose states' log was cut, and by `rwkvctl store
// check` and `repair` of one whose rows of turns cannot be read.
#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/state_store/embedded_state_store.h"
#include "services/state_store/offline/repair.h"
#include "services/state_store/records/rocksdb/rocksdb_record_store.h"
#include "services/state_store/testing/store_folder.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/files.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

namespace fs = std::filesystem;

using absl::StatusCode;
using testing::HasSubstr;
using testing::Not;
using testing::StatusIs;

class DamageNamesTest : public StoreFolderTest {
 protected:
  static std::string Id(int i) { return absl::StrCat("session-", i); }

  void AddTurns(int sessions, int turns, bool with_states) {
    for (int i = 0; i < sessions; ++i) {
      ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Create(Id(i)));
      for (int turn = 0; turn < turns; ++turn) {
        ASSERT_OK(store_->AddTurn(lease, absl::StrCat("r", turn), {1, 2}, {3}));
      }
      if (with_states) ASSERT_OK(store_->AddSnapshot(lease, absl::StrCat("x", i), turns * 3));
    }
  }

  // The largest file of the folder itself whose name ends so.
  static std::string Largest(const std::string& folder, absl::string_view suffix) {
    std::string largest;
    for (const auto& entry : fs::directory_iterator(folder)) {
      const bool fits = entry.is_regular_file() && absl::EndsWith(entry.path().string(), suffix);
      if (fits && (largest.empty() || entry.file_size() > fs::file_size(largest))) largest = entry.path().string();
    }
    return largest;
  }

  // A copy of a stopped store with a bit flipped in each block that has the key of a turn of those sessions in full.
  static std::string WithDamagedTurns(const std::string& stopped, const std::vector<std::string>& ids) {
    std::string folder = Copy(stopped);
    const std::string table = Largest(folder, ".sst");
    std::string bytes = rwkv::testing::ReadFile(table);
    for (const std::string& id : ids) {
      const size_t at = bytes.find(absl::StrCat("t", id, absl::string_view("\0", 1)));
      EXPECT_NE(at, std::string::npos) << id;
      if (at != std::string::npos) bytes[at] = static_cast<char>(bytes[at] ^ 1);
    }
    WriteFile(table, bytes);
    return folder;
  }

  std::unique_ptr<TestStore> store_ = std::make_unique<TestStore>();
};

TEST_F(DamageNamesTest, AStartNamesThoseWhoseStatesAreGoneWithTheEndOfALog) {
  constexpr int kSessions = 6;  // A line names no more than 8.
  AddTurns(kSessions, 2, /*with_states=*/true);
  const std::string killed = Copy(store_->data_dir());
  const uint64_t log_bytes = fs::file_size(Largest(killed + "/records", ".log"));
  std::set<size_t> lost_by_cut;
  for (const uint64_t left : {log_bytes, log_bytes - 1, log_bytes / 2, log_bytes / 4, uint64_t{0}}) {
    SCOPED_TRACE(absl::StrCat(left, " of ", log_bytes, " bytes"));
    const std::string folder = Copy(killed);
    fs::resize_file(Largest(folder + "/records", ".log"), left);
    ::testing::internal::CaptureStderr();
    const auto opened = Open(folder);
    const std::string log = ::testing::internal::GetCapturedStderr();
    ASSERT_OK(opened);
    size_t lost = 0;
    for (int i = 0; i < kSessions; ++i) {
      ASSERT_OK_AND_ASSIGN(const auto manifest, (*opened)->store().catalog().FindSnapshot(Id(i), 6, kTestModel));
      ASSERT_TRUE(manifest.has_value());
      bool whole = true;
      for (const v1::RecordInfo& info : manifest->records()) whole &= (*opened)->store().records().Get(info).ok();
      EXPECT_EQ(!whole, absl::StrContains(log, Id(i))) << log;
      lost += whole ? 0 : 1;
    }
    EXPECT_EQ(lost > 0, absl::StrContains(log, absl::StrCat(" states_lost snapshots=6 lost=", lost, " "))) << log;
    lost_by_cut.insert(lost);
  }
  EXPECT_THAT(lost_by_cut, testing::AllOf(testing::Contains(0u), testing::Contains(size_t{kSessions})));
  EXPECT_GE(lost_by_cut.size(), 3u) << "some, too";
}

TEST_F(DamageNamesTest, AStartNamesThoseWhoseFilesOfStatesAreGoneOrCut) {
  constexpr int kSessions = 4;
  const std::string data = TestRecordData(1, RocksdbRecordStore::kFileBytes);
  for (int i = 0; i < kSessions; ++i) {
    ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Create(Id(i)));
    ASSERT_OK(store_->AddTurn(lease, "r", {1, 2}, {3}));
    v1::SnapshotManifest manifest;
    manifest.set_snapshot_id(absl::StrCat("x", i));
    manifest.set_session_id(Id(i));
    manifest.set_position(3);
    manifest.set_model_fingerprint(kTestModel);
    *manifest.add_records() = TestRecordInfo(manifest.snapshot_id(), 0, data);
    ASSERT_OK(store_->records().Put(manifest.records(0), data));
    ASSERT_OK(store_->store().CommitSnapshot(lease, store_->LogBranch(Id(i)), manifest));
  }
  const std::string folder = Copy(store_->data_dir());
  fs::remove(folder + "/records/files/x1.record");
  fs::resize_file(folder + "/records/files/x2.record", data.size() - 1);
  for (int start = 0; start < 2; ++start) {
    ::testing::internal::CaptureStderr();
    const auto opened = Open(folder);
    const std::string log = ::testing::internal::GetCapturedStderr();
    ASSERT_OK(opened);
    EXPECT_THAT(log, HasSubstr("states_lost snapshots=4 lost=2 of=\"2 sessions (session-1, session-2)\""));
  }
}

TEST_F(DamageNamesTest, SessionsWhoseTurnsAreGoneWithABlockAreNamedAndNoOthers) {
  constexpr int kSessions = 8, kTurns = 60;  // About a block of each session.
  AddTurns(kSessions, kTurns, /*with_states=*/false);
  const std::string stopped = store_->data_dir();
  store_.reset();
  int named_trials = 0;
  for (int damaged = 3; damaged < kSessions; ++damaged) {  // A block before has the sessions' own rows.
    SCOPED_TRACE(absl::StrCat("turns of ", Id(damaged)));
    const std::string folder = WithDamagedTurns(stopped, {Id(damaged)});
    std::string said;
    const auto say = [&](const std::string& line) { absl::StrAppend(&said, line, "\n"); };
    EXPECT_THAT(CheckStore(folder, say), StatusIs(StatusCode::kDataLoss));
    const std::string checked = said;
    said.clear();
    ASSERT_OK(RepairStore(folder, say));
    ASSERT_OK_AND_ASSIGN(const auto opened, Open(folder));
    Catalog& catalog = opened->store().catalog();
    std::set<std::string> lost, named;
    for (int i = 0; i < kSessions; ++i) {
      SCOPED_TRACE(Id(i));
      const std::string name = absl::StrCat("older than acknowledged: session ", Id(i), ": turns of it may be gone");
      if (absl::StrContains(checked, name)) named.insert(Id(i));
      EXPECT_EQ(absl::StrContains(said, name), absl::StrContains(checked, name)) << said;
      ASSERT_OK_AND_ASSIGN(const v1::Session session, catalog.GetSession(Id(i)));
      // A request that was answered does not run again unless somebody has said so.
      ASSERT_OK_AND_ASSIGN(const LeaseGrant grant, catalog.AcquireLease(Id(i), "router-0", "2", absl::Minutes(1)));
      const auto begun = opened->store().BeginTurn(grant.lease, NewTurn{"new", {}, "", kTestModel});
      EXPECT_EQ(begun.ok(), named.count(Id(i)) == 0) << begun.status();
      if (!begun.ok()) {
        EXPECT_THAT(begun.status(), StatusIs(StatusCode::kDataLoss, HasSubstr("rewind it")));
        ASSERT_OK(opened->store().RewindSession(grant.lease, session.token_count()).status());
      }
      for (int turn = 0; turn < kTurns; ++turn) {
        ASSERT_OK_AND_ASSIGN(const auto found, catalog.FindTurn(Id(i), absl::StrCat("r", turn)));
        if (!found.has_value()) lost.insert(Id(i));
      }
    }
    EXPECT_EQ(named, lost);
    EXPECT_LT(lost.size(), size_t{kSessions});
    named_trials += lost.count(Id(damaged)) > 0 ? 1 : 0;
  }
  EXPECT_GE(named_trials, 3) << "the blocks that were damaged held other rows";
}

TEST_F(DamageNamesTest, RowsBetweenTwoBlocksThatCannotBeReadAreSaved) {
  constexpr int kSessions = 10, kTurns = 60;
  AddTurns(kSessions, kTurns, /*with_states=*/false);
  const std::string stopped = store_->data_dir();
  store_.reset();
  const std::string folder = WithDamagedTurns(stopped, {Id(3), Id(9)});
  std::string said;
  ASSERT_OK(RepairStore(folder, [&](const std::string& line) { absl::StrAppend(&said, line, "\n"); }));
  EXPECT_THAT(said, HasSubstr("10 sessions saved, 0 lost"));
  ASSERT_OK_AND_ASSIGN(const auto opened, Open(folder));
  for (const int between : {5, 6}) {
    EXPECT_THAT(said, Not(HasSubstr(Id(between))));
    for (int turn = 0; turn < kTurns; ++turn) {
      ASSERT_OK_AND_ASSIGN(const auto found, opened->store().catalog().FindTurn(Id(between), absl::StrCat("r", turn)));
      EXPECT_TRUE(found.has_value()) << Id(between) << ", turn " << turn;
    }
  }
}

}  // namespace
}  // namespace rwkv::state_store
