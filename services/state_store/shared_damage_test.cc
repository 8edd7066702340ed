// Rows of PostgreSQL and objects of S3 that somebody changes, cuts, takes away or puts elsewhere, one at a time, under
// stores that run and stores that start: every session has the tokens that were acknowledged, or says what is wrong with
// it, and a state is what was put or an error.
#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "gtest/gtest.h"
#include "services/state_store/client/state_store_client.h"
#include "services/state_store/rows/postgres/connection.h"
#include "services/state_store/rpc/state_catalog_service.h"
#include "services/state_store/testing/random_damage.h"
#include "services/state_store/testing/store_folder.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/files.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_servers.h"

namespace rwkv::state_store {
namespace {

namespace fs = std::filesystem;

using absl::StatusCode;
using testing::HasSubstr;
using testing::StatusIs;

struct Row {
  std::string key;  // With its tenant.
  std::string value;
};

class SharedDamageTest : public ::testing::Test {
 protected:
  SharedDamageTest() {
    TestStore::Options options;
    options.shared = true;
    store_ = std::make_unique<TestStore>(options);
    connection_ = *PostgresConnection::Open(SharedPostgres().url(), SharedPostgres().password(), absl::Seconds(10));
    Fill();
  }

  // Sessions with turns and snapshots, a fork, and an import, which has a state in place of its beginning.
  void Fill() {
    for (int i = 0; i < 3; ++i) {
      const std::string id = absl::StrCat("session-", i);
      ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Create(id));
      AddTurns(lease, i);
    }
    ASSERT_OK(store_->catalog().ForkSession("session-0", 50, "fork"));
    tokens_["fork"].assign(tokens_["session-0"].begin(), tokens_["session-0"].begin() + 50);
    ASSERT_OK(store_->Import("import", store_->tenant() + "-base", 1000, {}, true).status());
    begin_["import"] = 1000;
    ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Acquire("import"));
    AddTurns(lease, 7);
  }
  void AddTurns(const v1::Lease& lease, uint32_t answer) {
    const std::string& id = lease.session_id();
    for (uint32_t turn = 0; turn < 3; ++turn) {
      const std::vector<uint32_t> prompt(20, turn), generated(30, answer);
      ASSERT_OK(store_->AddTurn(lease, absl::StrCat("r", turn), prompt, generated));
      tokens_[id].insert(tokens_[id].end(), prompt.begin(), prompt.end());
      tokens_[id].insert(tokens_[id].end(), generated.begin(), generated.end());
      if (turn == 1) {
        ASSERT_OK(store_->AddSnapshot(lease, absl::StrCat(store_->tenant(), "-", id), begin_[id] + tokens_[id].size()));
      }
    }
  }

  static std::string Bytea(const std::string& bytes) {
    return absl::StrCat("'\\x", absl::BytesToHexString(bytes), "'");
  }
  void Execute(const std::string& sql) { ASSERT_OK(connection_->Execute(sql).status()) << sql; }
  std::vector<Row> Rows() {
    const auto rows =
        connection_->Execute("SELECT encode(key, 'hex'), encode(value, 'hex') FROM rwkv.rows ORDER BY key");
    EXPECT_OK(rows.status());
    std::vector<Row> ours;
    for (const std::vector<std::string>& row : *rows) {
      const std::string key = absl::HexStringToBytes(row[0]);
      const std::string prefix = absl::StrCat("@", store_->tenant(), absl::string_view("\0", 1));
      if (absl::StartsWith(key, prefix)) ours.push_back({key, absl::HexStringToBytes(row[1])});
    }
    return ours;
  }
  void PutRow(const Row& row) {
    Execute(absl::StrCat("INSERT INTO rwkv.rows VALUES (", Bytea(row.key), ", ", Bytea(row.value),
                         ") ON CONFLICT (key) DO UPDATE SET value = excluded.value"));
  }
  void DeleteRow(const std::string& key) { Execute(absl::StrCat("DELETE FROM rwkv.rows WHERE key = ", Bytea(key))); }

  // `gone`: the session whose own row is not there any more; of which nobody else knows. `states`: read them, too.
  void ExpectHonest(const std::string& gone, bool states = true) {
    for (const auto& [id, tokens] : tokens_) {
      SCOPED_TRACE(id);
      const auto session = store_->catalog().GetSession(id);
      absl::Status status = session.status();
      if (session.ok()) {
        const auto page = store_->catalog().ReadTokens(id, begin_[id], begin_[id] + tokens.size());
        status = page.status();
        if (page.ok()) EXPECT_EQ(page->token_ids, tokens);
      }
      if (id == gone) {
        EXPECT_EQ(status.code(), StatusCode::kNotFound) << status;
        continue;
      }
      if (!status.ok()) {
        ++refused_;
        EXPECT_EQ(status.code(), StatusCode::kDataLoss) << status;
      }
      for (const uint64_t position : {begin_[id], begin_[id] + tokens.size()}) {
        const auto manifest = store_->catalog().FindSnapshot(id, position, kTestModel);
        if (!manifest.ok()) {
          EXPECT_EQ(manifest.status().code(), StatusCode::kDataLoss) << manifest.status();
        } else if (manifest->has_value() && states) {
          ExpectHonestState(**manifest);
        }
      }
    }
  }
  void ExpectHonestState(const v1::SnapshotManifest& manifest) {
    for (const v1::RecordInfo& info : manifest.records()) {
      const auto record = store_->records().Get(info);
      if (record.ok()) {
        EXPECT_EQ(*record, TestRecordData(static_cast<uint32_t>(manifest.position() * 2 + info.layer()), 6000));
        continue;
      }
      const StatusCode code = record.status().code();
      EXPECT_TRUE(code == StatusCode::kDataLoss || code == StatusCode::kNotFound) << record.status();
      EXPECT_THAT(std::string(record.status().message()), HasSubstr(info.snapshot_id()));
      ++lost_records_;
    }
  }

  std::unique_ptr<TestStore> store_;
  std::unique_ptr<PostgresConnection> connection_;
  std::map<std::string, std::vector<uint32_t>> tokens_;  // From begin_ on.
  std::map<std::string, uint64_t> begin_;
  int refused_ = 0, lost_records_ = 0;
};

TEST_F(SharedDamageTest, OfRows) {
  ExpectHonest("");
  ASSERT_EQ(refused_ + lost_records_, 0);
  const std::vector<Row> rows = Rows();
  ASSERT_GT(rows.size(), 40u);
  std::mt19937 random(7);
  int starts = 0;
  for (size_t i = 0; i < rows.size() && !HasFailure(); ++i) {
    const Row& row = rows[i];
    const Row& other = rows[(i + 1 + random() % (rows.size() - 1)) % rows.size()];
    const std::string name = row.key.substr(store_->tenant().size() + 2);
    const std::string gone = name[0] == 's' ? name.substr(1) : "";
    const int start = static_cast<int>(random() % 6);
    for (int damage = 0; damage < 6 && !HasFailure(); ++damage) {
      SCOPED_TRACE(absl::StrCat("row ", absl::CHexEscape(name), ", damage ", damage));
      std::string value = row.value, moved_to, what;
      bool deleted = false;
      switch (damage) {
        case 0:
        case 1:
        case 2:
          what = DamageAtRandom(value, random);
          PutRow({row.key, value});
          break;
        case 3:
          deleted = true;
          DeleteRow(row.key);
          break;
        case 4:  // As another row is.
          PutRow({row.key, other.value});
          break;
        case 5:  // A bit of the key.
          deleted = true;
          moved_to = row.key;
          moved_to[moved_to.size() - 1 - random() % name.size()] ^= static_cast<char>(1 << random() % 8);
          DeleteRow(row.key);
          PutRow({moved_to, row.value});
          break;
      }
      SCOPED_TRACE(what);
      if (damage == start) {  // One that starts now finds it, too.
        const absl::Status opened = store_->Reopen();
        ++starts;
        EXPECT_OK(opened) << "one row keeps all sessions from being served";
        if (!opened.ok()) return;
      }
      ExpectHonest(deleted ? gone : "", /*states=*/damage == start);
      if (!moved_to.empty()) DeleteRow(moved_to);
      PutRow(row);
      if (HasFailure()) break;
      if (!moved_to.empty() && std::any_of(rows.begin(), rows.end(), [&](const Row& r) { return r.key == moved_to; })) {
        PutRow(*std::find_if(rows.begin(), rows.end(), [&](const Row& r) { return r.key == moved_to; }));
      }
    }
  }
  EXPECT_GT(refused_, 20);
  const int before = refused_;
  ExpectHonest("");
  EXPECT_EQ(refused_, before) << "all is as it was";
  EXPECT_OK(CheckCatalogRows(store_->rows(), 8));
  std::printf("%zu rows, %d answers refused, %d starts\n", rows.size(), refused_, starts);
}

// One damaged session is its own: its router keeps the leases of the others, and they end when it is their time.
TEST_F(SharedDamageTest, OfOneSessionIsNoHindranceToTheOthers) {
  TestStore::Options options;
  options.shared = true;
  options.limits.idle_ttl = absl::Hours(1);
  store_ = std::make_unique<TestStore>(options);
  tokens_.clear();
  Fill();
  ASSERT_OK_AND_ASSIGN(const v1::Lease damaged, store_->Acquire("session-1"));
  ASSERT_OK_AND_ASSIGN(const v1::Lease whole, store_->Acquire("session-2"));
  std::vector<Row> branches;
  for (Row& row : Rows()) {
    const std::string name = row.key.substr(store_->tenant().size() + 2);
    if (name[0] == 'b') branches.push_back(row);
    if (name != "ssession-1") continue;
    row.value[0] ^= 1;
    PutRow(row);
  }
  ASSERT_OK_AND_ASSIGN(const std::vector<v1::Lease> lost,
                       store_->catalog().RenewLeases({damaged, whole}, absl::Minutes(1)));
  ASSERT_EQ(lost.size(), 1u);
  EXPECT_EQ(lost[0].session_id(), "session-1");

  ASSERT_EQ(branches.size(), 5u);  // In the order in which they were made: the third is that of session-2.
  branches[2].value[0] ^= 1;
  PutRow(branches[2]);
  store_->clock().Advance(absl::Hours(2));
  EXPECT_OK(store_->store().SweepSessions());
  for (const char* const id : {"session-0", "fork", "import"}) {
    EXPECT_THAT(store_->catalog().GetSession(id), StatusIs(StatusCode::kNotFound)) << id;
  }
  for (const char* const id : {"session-1", "session-2"}) {
    EXPECT_THAT(store_->catalog().GetSession(id), StatusIs(StatusCode::kDataLoss)) << id;
  }
}

TEST_F(SharedDamageTest, AnAnswerNamesTheSession) {
  StateCatalogService service({"store", 1, ""}, &store_->store(), &store_->metrics());
  grpc::ServerBuilder builder;
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  const auto client = NewCatalogClient(server->InProcessChannel(grpc::ChannelArguments()));
  int answers = 0;
  for (const Row& row : Rows()) {
    const char kind = row.key[store_->tenant().size() + 2];
    if (absl::string_view("sblpm").find(kind) == absl::string_view::npos) continue;
    PutRow({row.key, row.value.substr(1)});
    for (const auto& [id, tokens] : tokens_) {
      const absl::Time deadline = absl::Now() + absl::Seconds(30);
      v1::ReadTokensRequest read;
      read.set_session_id(id);
      read.set_begin(begin_[id]);
      read.set_end(begin_[id] + tokens.size());
      v1::FindSnapshotRequest find;
      find.set_session_id(id);
      find.set_at_or_before(read.end());
      find.set_model_fingerprint(kTestModel);
      for (const absl::Status& status :
           {client->ReadTokens(read, deadline).status(), client->FindSnapshot(find, deadline).status()}) {
        if (status.ok()) continue;
        EXPECT_THAT(status, StatusIs(StatusCode::kDataLoss, HasSubstr(id))) << absl::CHexEscape(row.key);
        ++answers;
      }
    }
    PutRow(row);
  }
  EXPECT_GT(answers, 20);
}

TEST_F(SharedDamageTest, OfObjects) {
  std::mt19937 random(7);
  std::vector<std::string> objects;
  for (const auto& entry : fs::directory_iterator(SharedS3().bucket_folder())) {
    if (absl::StrContains(entry.path().filename().string(), store_->tenant() + "%2F")) objects.push_back(entry.path());
  }
  std::sort(objects.begin(), objects.end());
  ASSERT_EQ(objects.size(), 10u);  // Two of each snapshot.
  for (size_t i = 0; i < objects.size() && !HasFailure(); ++i) {
    const std::string whole = testing::ReadFile(objects[i]);
    ASSERT_EQ(whole.size(), 6000u);
    for (int damage = 0; damage < 8 && !HasFailure(); ++damage) {
      std::string bytes = whole, what;
      SCOPED_TRACE(absl::StrCat(objects[i], ", damage ", damage));
      switch (damage) {
        case 5:
          fs::remove(objects[i]);
          break;
        case 6:
          WriteFile(objects[i], whole + "x");
          break;
        case 7:  // As another is.
          WriteFile(objects[i], testing::ReadFile(objects[(i + 1) % objects.size()]));
          break;
        default:
          what = DamageAtRandom(bytes, random);
          WriteFile(objects[i], bytes);
      }
      SCOPED_TRACE(what);
      const int lost = lost_records_;
      ExpectHonest("");
      EXPECT_GT(lost_records_, lost);
      WriteFile(objects[i], whole);
    }
  }
  EXPECT_EQ(refused_, 0) << "tokens are not in S3";
  const int before = lost_records_;
  ExpectHonest("");
  EXPECT_EQ(lost_records_, before) << "all is as it was";
}

}  // namespace
}  // namespace rwkv::state_store
