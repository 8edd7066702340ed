// A list of the catalog's files (MANIFEST) that was cut, of a killed store: RocksDB takes it for a shorter one, and
// deletes the tables that came after. `rwkvctl store repair` reads them all the same.
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rocksdb/db.h"
#include "services/state_store/embedded_state_store.h"
#include "services/state_store/offline/repair.h"
#include "services/state_store/rocksdb/database.h"
#include "services/state_store/rows/row_store.h"
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

class DamageListTest : public StoreFolderTest {
 protected:
  DamageListTest() {  // Files go when a test says so.
    const auto access = store_.database().Read();
    EXPECT_TRUE(access->db().SetOptions(access->family(Family::kCatalog), {{"disable_auto_compactions", "true"}}).ok());
  }

  void AddTurns(const v1::Lease& lease, const std::string& id, int turns) {
    for (int turn = 0; turn < turns; ++turn) {
      std::vector<uint32_t>& tokens = tokens_[id];
      const uint32_t n = static_cast<uint32_t>(tokens.size());
      ASSERT_OK(store_.AddTurn(lease, absl::StrCat("r", n), {n, 1, 2}, {n, 3, 4}));
      tokens.insert(tokens.end(), {n, 1, 2, n, 3, 4});
    }
  }

  void Flush() {
    ASSERT_OK_AND_ASSIGN(const Database::Access access, store_.database().Read());
    ASSERT_TRUE(access.db().Flush({}, {access.family(Family::kMeta), access.family(Family::kCatalog)}).ok());
  }

  // The list of files in a folder.
  static std::string List(const std::string& folder) {
    for (const auto& entry : fs::directory_iterator(folder)) {
      if (absl::StartsWith(entry.path().filename().string(), "MANIFEST-")) return entry.path().string();
    }
    return "";
  }

  // The names of the tables in a folder.
  static std::set<std::string> Tables(const std::string& folder) {
    std::set<std::string> tables;
    for (const auto& entry : fs::directory_iterator(folder)) {
      if (entry.path().extension() == ".sst") tables.insert(entry.path().filename().string());
    }
    return tables;
  }
  static std::string NewestTable(const std::string& folder) { return *Tables(folder).rbegin(); }

  static void FlipABit(const std::string& path) {
    std::string bytes = testing::ReadFile(path);
    bytes[bytes.size() / 4] ^= 1;
    WriteFile(path, bytes);
  }

  // A session is deleted, and the journal knows no more of it. Returns the tables that it was in, which are gone.
  std::map<std::string, std::string> DeleteLongAgo(const std::string& id) {
    leases_[id] = *store_.Create(id);
    AddTurns(leases_[id], id, 4);
    Flush();
    std::map<std::string, std::string> tables;
    for (const std::string& name : Tables(store_.data_dir())) {
      tables[name] = testing::ReadFile(store_.data_dir() + "/" + name);
    }
    Delete(id);
    {
      const auto access = store_.database().Read();
      EXPECT_TRUE(access->db().CompactRange({}, access->family(Family::kCatalog), nullptr, nullptr).ok());
    }
    EXPECT_OK(store_.database().AcceptLoss());
    for (const std::string& name : Tables(store_.data_dir())) tables.erase(name);
    EXPECT_FALSE(tables.empty());
    return tables;
  }

  // A store whose sessions began, went on and ended before, between and after two flushes, killed. Its list of files
  // has lost the second one. And there is a table that was left over, whose rows were deleted before.
  std::string KilledAndCut() {
    const std::map<std::string, std::string> left = DeleteLongAgo("long-gone");
    for (const char* const id : {"first", "rewound", "gone-between", "gone-after", "again"}) {
      leases_[id] = *store_.Create(id);
      AddTurns(leases_[id], id, 4);
    }
    Flush();
    EXPECT_OK(store_.database().AcceptLoss());  // The journal knows of what follows.
    const uintmax_t bytes = fs::file_size(List(store_.data_dir()));
    for (const char* const id : {"second", "second-gone"}) {
      leases_[id] = *store_.Create(id);
      AddTurns(leases_[id], id, 4);
    }
    AddTurns(leases_["first"], "first", 2);
    EXPECT_OK(store_.store().RewindSession(leases_["rewound"], 12));
    tokens_["rewound"].resize(12);
    for (const char* const id : {"gone-between", "again"}) Delete(id);
    leases_["again"] = *store_.Create("again");
    AddTurns(leases_["again"], "again", 1);
    Flush();
    for (const char* const id : {"gone-after", "second-gone"}) Delete(id);
    leases_["third"] = *store_.Create("third");
    AddTurns(leases_["third"], "third", 4);
    AddTurns(leases_["second"], "second", 1);
    const std::string folder = Copy(store_.data_dir());
    EXPECT_LT(bytes, fs::file_size(List(folder)));
    fs::resize_file(List(folder), bytes);
    for (const auto& [name, content] : left) WriteFile(folder + "/" + name, content);
    return folder;
  }

  void Delete(const std::string& id) {
    EXPECT_OK(store_.store().DeleteSession(leases_[id]));
    tokens_.erase(id);
  }

  static std::map<std::string, std::string> Rows(RowStore& rows) {
    std::map<std::string, std::string> all;
    const auto reader = rows.Read();
    EXPECT_OK((*reader)->Scan("", "\x7f", [&](absl::string_view key, absl::string_view value) -> absl::StatusOr<bool> {
      if (key != "next_id" && key[0] != '!') all[std::string(key)] = std::string(value);
      return true;
    }));
    return all;
  }

  void ExpectRefused(const std::string& folder) {
    EXPECT_THAT(Open(folder).status(), StatusIs(StatusCode::kDataLoss, HasSubstr("rwkvctl store repair")));
  }

  // Repairs it, and expects just the sessions that there were.
  void ExpectRepaired(const std::string& folder) {
    std::string said;
    const auto say = [&](const std::string& line) { absl::StrAppend(&said, line, "\n"); };
    ASSERT_OK(RepairStore(folder, say)) << said;
    EXPECT_THAT(said, HasSubstr("0 lost"));
    EXPECT_THAT(said, Not(HasSubstr("older than acknowledged"))) << said;
    ASSERT_OK_AND_ASSIGN(const auto embedded, Open(folder));
    EXPECT_OK(CheckCatalogRows(embedded->rows(), 8));
    EXPECT_EQ(Rows(embedded->rows()), Rows(store_.rows())) << said;
    for (const auto& [id, tokens] : tokens_) {
      ASSERT_OK_AND_ASSIGN(const TokenPage page, embedded->store().catalog().ReadTokens(id, 0, tokens.size()));
      EXPECT_EQ(page.token_ids, tokens) << id;
    }
  }

  TestStore store_;
  std::map<std::string, v1::Lease> leases_;
  std::map<std::string, std::vector<uint32_t>> tokens_;  // Of the sessions that there are.
};

TEST_F(DamageListTest, TablesThatACutListDoesNotNameAreRepairedFrom) {
  const std::string folder = KilledAndCut();
  std::map<std::string, std::string> tables;
  for (const std::string& name : Tables(folder)) tables[name] = testing::ReadFile(folder + "/" + name);
  ExpectRepaired(folder);
  // The damaged files are as they were.
  for (const auto& [name, bytes] : tables) {
    EXPECT_EQ(testing::ReadFile(absl::StrCat(folder, "/damaged-0/", name)), bytes) << name;
  }
}

TEST_F(DamageListTest, AlsoAfterTheStoreWasStartedAndRefused) {
  const std::string folder = KilledAndCut();
  for (int start = 0; start < 3; ++start) ExpectRefused(folder);
  ExpectRepaired(folder);
}

TEST_F(DamageListTest, WithoutThemTheRestIsSavedAsIfTheyHadNeverBeen) {
  const std::string folder = KilledAndCut();
  FlipABit(folder + "/" + NewestTable(folder));  // Which the list has lost.
  ExpectRefused(folder);
  std::string said;
  ASSERT_OK(RepairStore(folder, [&](const std::string& line) { absl::StrAppend(&said, line, "\n"); }));
  EXPECT_THAT(said, HasSubstr("lost: session second: "));
  ASSERT_OK_AND_ASSIGN(const auto embedded, Open(folder));
  ASSERT_OK_AND_ASSIGN(const TokenPage page, embedded->store().catalog().ReadTokens("third", 0, 24));
  EXPECT_EQ(page.token_ids, tokens_["third"]);
}

TEST_F(DamageListTest, OfRowsThatBelongTogetherNoneIsTakenWhereOneIsLost) {
  leases_["first"] = *store_.Create("first");
  AddTurns(leases_["first"], "first", 4);
  Flush();
  const uintmax_t bytes = fs::file_size(List(store_.data_dir()));
  std::vector<std::string> newest;
  for (int flush = 0; flush < 2; ++flush) {
    AddTurns(leases_["first"], "first", 1);
    Flush();
    newest.push_back(NewestTable(store_.data_dir()));
  }
  const std::string folder = Copy(store_.data_dir());
  fs::resize_file(List(folder), bytes);
  FlipABit(folder + "/" + newest[0]);
  std::string said;
  ASSERT_OK(RepairStore(folder, [&](const std::string& line) { absl::StrAppend(&said, line, "\n"); }));
  EXPECT_THAT(said, HasSubstr("older than acknowledged: session first: "));
  EXPECT_THAT(said, HasSubstr("1 sessions saved, 0 lost"));
}

TEST_F(DamageListTest, TablesAreKeptJustUntilAStartHasFoundAllThatWasAcknowledged) {
  leases_["first"] = *store_.Create("first");
  AddTurns(leases_["first"], "first", 4);
  Flush();
  const std::string folder = Copy(store_.data_dir());
  ASSERT_OK(Open(folder));
  EXPECT_FALSE(fs::exists(folder + "/kept"));
}

}  // namespace
}  // namespace rwkv::state_store
