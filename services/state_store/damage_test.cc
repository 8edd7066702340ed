// Files of a store that is not running, changed at many places: bits flipped, parts zeroed, ends cut. Whatever it is,
// the store either says so, or every session has the tokens that were acknowledged.
#include <filesystem>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rocksdb/db.h"
#include "services/state_store/embedded_state_store.h"
#include "services/state_store/offline/repair.h"
#include "services/state_store/testing/random_damage.h"
#include "services/state_store/testing/store_folder.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/files.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsOkAndHolds;
using testing::StatusIs;

std::vector<std::string> Files(const std::string& folder) {
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file() && entry.path().filename() != "LOCK") files.push_back(entry.path().string());
  }
  std::sort(files.begin(), files.end());
  return files;
}

class DamageTest : public StoreFolderTest {
 protected:
  static constexpr int kSessions = 6;

  // Sessions with turns and snapshots, one of them a fork.
  void Fill() {
    store_ = std::make_unique<TestStore>();
    for (int i = 0; i < kSessions; ++i) {
      const std::string id = absl::StrCat("session-", i);
      ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Create(id));
      for (uint32_t turn = 0; turn < 6; ++turn) {
        std::vector<uint32_t> prompt(20, turn), answer(30, i);
        ASSERT_OK(store_->AddTurn(lease, absl::StrCat("r", turn), prompt, answer));
        tokens_[id].insert(tokens_[id].end(), prompt.begin(), prompt.end());
        tokens_[id].insert(tokens_[id].end(), answer.begin(), answer.end());
        if (turn % 2 == 1) {
          ASSERT_OK(store_->AddSnapshot(lease, absl::StrCat("x", i, ".", turn), tokens_[id].size()));
        }
      }
    }
    ASSERT_OK(store_->catalog().ForkSession("session-0", 120, "fork"));
    tokens_["fork"].assign(tokens_["session-0"].begin(), tokens_["session-0"].begin() + 120);
  }

  // A copy of the store's folder: as it is now, which is as a kill leaves it, or after a clean stop.
  std::string Killed() { return Copy(store_->data_dir()); }
  std::string Stopped() {
    const std::string folder = store_->data_dir();
    store_.reset();
    return folder;
  }
  // The log-probabilities are not looked at.
  static absl::StatusOr<std::vector<uint32_t>> Tokens(Catalog& catalog, const std::string& id) {
    const absl::StatusOr<v1::Session> session = catalog.GetSession(id);
    if (!session.ok()) return session.status();
    absl::StatusOr<TokenPage> page = catalog.ReadTokens(id, 0, session->token_count());
    if (!page.ok()) return page.status();
    return page->token_ids;
  }

  // How the store answers after damage. `records_only`: then nothing of the catalog may suffer.
  void ExpectHonest(const std::string& folder, bool records_only) {
    const auto embedded = Open(folder);
    if (!embedded.ok()) {
      EXPECT_FALSE(records_only) << embedded.status();
      EXPECT_EQ(embedded.status().code(), StatusCode::kDataLoss) << embedded.status();
      EXPECT_THAT(std::string(embedded.status().message()),
                  AllOf(HasSubstr(folder), HasSubstr("rwkvctl store repair")));
      ++refused_;
      return;
    }
    ++opened_;
    StateStore& store = (*embedded)->store();
    for (const auto& [id, tokens] : tokens_) {
      const auto got = Tokens(store.catalog(), id);
      if (got.ok()) {
        EXPECT_EQ(*got, tokens) << id;
      } else {
        EXPECT_FALSE(records_only) << got.status();
        EXPECT_EQ(got.status().code(), StatusCode::kDataLoss) << got.status();
      }
      const auto manifest = store.catalog().FindSnapshot(id, tokens.size(), kTestModel);
      if (!manifest.ok() || !manifest->has_value()) continue;
      for (const v1::RecordInfo& info : (*manifest)->records()) {
        const auto record = store.records().Get(info);
        const StatusCode code = record.status().code();
        EXPECT_TRUE(code == StatusCode::kOk || code == StatusCode::kDataLoss || code == StatusCode::kNotFound)
            << record.status();
        if (record.ok()) {
          EXPECT_EQ(*record, TestRecordData(static_cast<uint32_t>((*manifest)->position() * 2 + info.layer()), 6000));
        }
      }
    }
  }

  void Try(const std::string& original, int trials, uint32_t seed) {
    std::mt19937 random(seed);
    const std::vector<std::string> files = Files(original);
    for (int trial = 0; trial < trials; ++trial) {
      const std::string copy = Copy(original);
      const std::string relative = std::filesystem::relative(files[random() % files.size()], original).string();
      std::string bytes = testing::ReadFile(copy + "/" + relative);
      if (bytes.empty()) continue;
      const std::string what = DamageAtRandom(bytes, random);
      SCOPED_TRACE(absl::StrCat("seed ", seed, ", trial ", trial, ": ", relative, ", ", what));
      WriteFile(copy + "/" + relative, bytes);
      ExpectHonest(copy, absl::StartsWith(relative, "records/"));
      std::filesystem::remove_all(copy);
      if (HasFailure()) return;
    }
  }

  std::unique_ptr<TestStore> store_;
  std::map<std::string, std::vector<uint32_t>> tokens_;
  int opened_ = 0;
  int refused_ = 0;
};

TEST_F(DamageTest, CleanStopLeavesNothingInTheLog) {
  Fill();
  const std::string folder = Stopped();
  int logs = 0;
  for (const std::string& file : Files(folder)) {
    if (!absl::EndsWith(file, ".log")) continue;
    ++logs;
    EXPECT_EQ(std::filesystem::file_size(file), 0u) << file;
  }
  EXPECT_GE(logs, 1);
  ASSERT_OK_AND_ASSIGN(const auto embedded, Open(folder));
  for (const auto& [id, tokens] : tokens_) EXPECT_THAT(Tokens(embedded->store().catalog(), id), IsOkAndHolds(tokens));
}

TEST_F(DamageTest, FilesOfAStoppedStore) {
  Fill();
  Try(Stopped(), 60, 1);
  EXPECT_GT(opened_, 10);
  EXPECT_GT(refused_, 5);
}

TEST_F(DamageTest, FilesOfAKilledStore) {
  Fill();
  Try(Killed(), 60, 2);
  EXPECT_GT(opened_, 10);
  EXPECT_GT(refused_, 5);
}

TEST_F(DamageTest, LogThatWasCutAnywhereIsNoticedWhereverThatIs) {
  Fill();
  const std::string original = Killed();
  std::string log;
  for (const std::string& file : Files(original)) {
    if (absl::EndsWith(file, ".log") && !absl::StrContains(file, "/records/") &&
        std::filesystem::file_size(file) > 1000) {
      log = std::filesystem::relative(file, original).string();
    }
  }
  ASSERT_FALSE(log.empty());
  const size_t size = std::filesystem::file_size(original + "/" + log);
  for (size_t cut = 1; cut < size; cut += size / 12) {
    const std::string copy = Copy(original);
    std::filesystem::resize_file(copy + "/" + log, size - cut);
    const auto embedded = Open(copy);
    ASSERT_THAT(embedded, StatusIs(StatusCode::kDataLoss, HasSubstr("acknowledged rows are missing"))) << cut;
    // Nothing has changed by looking.
    EXPECT_THAT(Open(copy), StatusIs(StatusCode::kDataLoss, HasSubstr("rwkvctl store check"))) << cut;
    std::filesystem::remove_all(copy);
  }
}

TEST_F(DamageTest, TheSessionsThatLostSomethingAreNamed) {
  Fill();
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Acquire("session-3"));
  ASSERT_OK(store_->AddTurn(lease, "last", {1}, {2}));
  const std::string folder = Killed();
  for (const std::string& file : Files(folder)) {
    if (absl::EndsWith(file, ".log") && !absl::StrContains(file, "/records/") && std::filesystem::file_size(file) > 0) {
      std::filesystem::resize_file(file, std::filesystem::file_size(file) - 1);
    }
  }
  EXPECT_THAT(Open(folder), StatusIs(StatusCode::kDataLoss, HasSubstr("of 1 session (session-3)")));
}

TEST_F(DamageTest, RepairSavesTheOthersAndSaysWhatIsLost) {
  Fill();
  const std::string original = Killed();
  std::vector<std::string> files;
  for (const std::string& file : Files(original)) {
    const std::string name = std::filesystem::relative(file, original).string();
    const bool matters = absl::EndsWith(name, ".log") || absl::StartsWith(name, "MANIFEST") || name == "CURRENT";
    if (matters && std::filesystem::file_size(file) > 0) files.push_back(name);
  }
  ASSERT_GE(files.size(), 3u);
  std::mt19937 random(3);
  int saved = 0, damaged = 0;
  for (int trial = 0; trial < 16; ++trial) {
    const std::string copy = Copy(original);
    const std::string path = copy + "/" + files[trial % files.size()];
    std::string bytes = testing::ReadFile(path);
    const size_t at = random() % bytes.size();
    if (trial % 2 == 0) {
      bytes[at] = static_cast<char>(bytes[at] ^ (1 << random() % 8));
    } else {
      bytes.resize(at);
    }
    WriteFile(path, bytes);
    SCOPED_TRACE(absl::StrCat("trial ", trial, ": ", path, " at ", at));
    if (Open(copy).ok()) continue;
    ++damaged;
    std::string said;
    const auto say = [&](const std::string& line) { absl::StrAppend(&said, line, "\n"); };
    EXPECT_THAT(CheckStore(copy, say), StatusIs(StatusCode::kDataLoss));
    EXPECT_THAT(said, HasSubstr("does not start"));
    said.clear();
    ASSERT_OK(RepairStore(copy, say));
    ASSERT_OK_AND_ASSIGN(const auto embedded, Open(copy));
    ASSERT_OK(CheckCatalogRows(embedded->rows(), 8)) << said;
    for (const auto& [id, tokens] : tokens_) {
      const auto got = Tokens(embedded->store().catalog(), id);
      if (got.ok() && *got == tokens) ++saved;
      if (got.ok() && *got == tokens) continue;
      // What is not as it was is named, and goes on only once somebody has said so.
      EXPECT_THAT(said, HasSubstr(absl::StrCat("session ", id)));
      if (!got.ok()) continue;
      ASSERT_LE(got->size(), tokens.size());
      const auto lease = embedded->store().catalog().AcquireLease(id, "router-0", "2", absl::Minutes(1));
      ASSERT_OK(lease);
      EXPECT_THAT(embedded->store().BeginTurn(lease->lease, NewTurn{"new", {}, "", kTestModel}),
                  StatusIs(StatusCode::kDataLoss, HasSubstr("rewind it")));
      ASSERT_OK(embedded->store().RewindSession(lease->lease, got->size()));
      EXPECT_OK(embedded->store().BeginTurn(lease->lease, NewTurn{"new", {}, "", kTestModel}));
    }
    std::error_code busy;  // The store still deletes files of its own.
    std::filesystem::remove_all(copy, busy);
    if (HasFailure()) return;
  }
  EXPECT_GT(damaged, 5);
  EXPECT_GT(saved, damaged) << "of " << damaged << " stores";
}

TEST_F(DamageTest, CheckSaysThatAStoreDoesNotStartJustWhenItDoesNot) {
  Fill();
  const std::string original = Stopped();
  std::string table;  // Of the rows.
  for (const std::string& file : Files(original)) {
    const bool catalogs = absl::EndsWith(file, ".sst") && !absl::StrContains(file, "/records/");
    if (catalogs && (table.empty() || std::filesystem::file_size(file) > std::filesystem::file_size(table))) {
      table = file;
    }
  }
  ASSERT_FALSE(table.empty());
  const std::string bytes = testing::ReadFile(table);
  int saved = 0;
  for (size_t at = 0; at < bytes.size(); at += bytes.size() / 24) {
    const std::string copy = Copy(original);
    SCOPED_TRACE(absl::StrCat("a bit flipped at ", at, " of ", bytes.size()));
    std::string damaged = bytes;
    damaged[at] = static_cast<char>(damaged[at] ^ 1);
    WriteFile(copy + "/" + std::filesystem::relative(table, original).string(), damaged);
    std::string said;
    CheckStore(copy, [&](const std::string& line) { absl::StrAppend(&said, line, "\n"); }).IgnoreError();
    const int refused = refused_;
    ExpectHonest(copy, /*records_only=*/false);
    EXPECT_EQ(absl::StrContains(said, "does not start"), refused_ > refused) << said;
    ASSERT_OK(RepairStore(copy, [](const std::string&) {}));
    ASSERT_OK_AND_ASSIGN(const auto embedded, Open(copy));
    for (const auto& [id, tokens] : tokens_) {
      const auto got = Tokens(embedded->store().catalog(), id);
      saved += got.ok() && *got == tokens;
    }
  }
  EXPECT_GT(opened_, 3);
  EXPECT_GT(refused_, 3);
  EXPECT_GT(saved, 30) << "of stores whose sessions share a few blocks";
}

TEST_F(DamageTest, AWholeStoreIsFoundToBeWhole) {
  Fill();
  const std::string folder = Stopped();
  std::string said;
  const auto say = [&](const std::string& line) { absl::StrAppend(&said, line, "\n"); };
  ASSERT_OK(CheckStore(folder, say)) << said;
  EXPECT_THAT(said, HasSubstr("7 sessions"));
  for (const std::string& file : Files(folder)) {
    if (absl::EndsWith(file, ".blob")) WriteFile(file, std::string(testing::ReadFile(file).size(), '\0'));
  }
  EXPECT_THAT(CheckStore(folder, say), StatusIs(StatusCode::kDataLoss, HasSubstr("lost states")));
}

// A supervisor may start the store anew meanwhile, or an operator try again: no files are taken from under anybody.
TEST_F(DamageTest, NobodyElseHasAFolderThatIsCheckedOrRepaired) {
  Fill();
  const std::string folder = Stopped();
  const auto nobody = [](const std::string&) {};
  int lines = 0;
  const auto busy = [&](const std::string&) {
    if (lines++ > 0) return;
    EXPECT_THAT(CheckStore(folder, nobody), StatusIs(StatusCode::kUnavailable, HasSubstr("stop it first")));
    EXPECT_THAT(RepairStore(folder, nobody), StatusIs(StatusCode::kUnavailable));
  };
  EXPECT_OK(CheckStore(folder, busy));
  EXPECT_GT(lines, 0);
  lines = 0;
  EXPECT_OK(RepairStore(folder, busy));
  EXPECT_GT(lines, 0);
  EXPECT_OK(CheckStore(folder, nobody));
}

TEST_F(DamageTest, StateRecordsNeverKeepAStoreFromStarting) {
  Fill();
  const std::string folder = Stopped();
  int damaged = 0;
  for (const std::string& file : Files(folder)) {
    if (!absl::StrContains(file, "/records/")) continue;
    const std::string bytes = testing::ReadFile(file);
    if (bytes.empty()) continue;
    ++damaged;
    for (const bool gone : {true, false}) {
      const std::string copy = Copy(folder);
      const std::string path = copy + "/" + std::filesystem::relative(file, folder).string();
      SCOPED_TRACE(path);
      std::filesystem::remove(path);
      if (!gone) WriteFile(path, std::string(bytes.size(), '\0'));
      ExpectHonest(copy, /*records_only=*/true);
      std::filesystem::remove_all(copy);
    }
  }
  EXPECT_GE(damaged, 4);
}

// --- What older builds wrote ------------------------------------------------------------------------------------------

TEST_F(DamageTest, FoldersOfFormat1AreTakenOver) {
  Fill();
  // As an older build has it: one database, rows without checksums in the family "catalog".
  const std::string folder = NewTestFolder() + "/former";
  rocksdb::Options options;
  options.create_if_missing = options.create_missing_column_families = true;
  std::vector<rocksdb::ColumnFamilyDescriptor> families;
  for (const char* name : {"default", "catalog", "record_infos", "records"}) families.emplace_back(name, options);
  std::vector<rocksdb::ColumnFamilyHandle*> handles;
  rocksdb::DB* opened = nullptr;
  ASSERT_TRUE(rocksdb::DB::Open(options, folder, families, &handles, &opened).ok());
  std::unique_ptr<rocksdb::DB> db(opened);
  const auto copy = [&](Database& from, Family family, rocksdb::ColumnFamilyHandle* to, size_t dropped) {
    ASSERT_OK_AND_ASSIGN(const Database::Access access, from.Read());
    const std::unique_ptr<rocksdb::Iterator> it(access.db().NewIterator(rocksdb::ReadOptions(), access.family(family)));
    for (it->SeekToFirst(); it->Valid(); it->Next()) {
      const std::string value = it->value().ToString();
      ASSERT_TRUE(db->Put({}, to, it->key(), value.substr(0, value.size() - dropped)).ok());
    }
  };
  copy(store_->database(), Family::kCatalog, handles[1], 4);
  copy(store_->records_database(), Family::kRecordInfos, handles[2], 0);
  copy(store_->records_database(), Family::kRecords, handles[3], 0);
  ASSERT_TRUE(db->Put({}, handles[0], "format_version", "1").ok());
  for (rocksdb::ColumnFamilyHandle* handle : handles) db->DestroyColumnFamilyHandle(handle);
  ASSERT_TRUE(db->Close().ok());
  db.reset();
  for (int start = 0; start < 2; ++start) {
    ASSERT_OK_AND_ASSIGN(const auto embedded, Open(folder));
    for (const auto& [id, tokens] : tokens_) {
      EXPECT_THAT(Tokens(embedded->store().catalog(), id), IsOkAndHolds(tokens));
      ASSERT_OK_AND_ASSIGN(const auto manifest,
                           embedded->store().catalog().FindSnapshot(id, tokens.size(), kTestModel));
      ASSERT_TRUE(manifest.has_value());
      for (const v1::RecordInfo& info : manifest->records()) ASSERT_OK(embedded->store().records().Get(info));
    }
    ASSERT_OK(CheckCatalogRows(embedded->rows(), 8));
  }
}

}  // namespace
}  // namespace rwkv::state_store
