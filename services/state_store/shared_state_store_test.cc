// Stores that share one PostgreSQL and one S3: any of them serves any session, whatever dies.
#include "services/state_store/shared_state_store.h"

#include <atomic>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/metrics.h"
#include "services/state_store/offline/repair.h"
#include "services/state_store/records/s3/s3_client.h"
#include "services/state_store/records/s3/s3_record_store.h"
#include "services/state_store/rows/postgres/connection.h"
#include "services/state_store/rows/postgres/postgres_row_store.h"
#include "services/state_store/testing/background.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_servers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::IsOkAndHolds;
using testing::Not;
using testing::StatusIs;

class SharedStateStoreTest : public ::testing::Test {
 protected:
  static TestStore::Options Options(const std::string& tenant) {
    TestStore::Options options;
    options.shared = true;
    options.tenant = tenant;
    return options;
  }
  static S3Client::Options S3() {
    S3Client::Options options;
    options.endpoint = SharedS3().endpoint();
    options.bucket = rwkv::testing::S3Server::kBucket;
    options.access_key = rwkv::testing::S3Server::kAccessKey;
    options.secret_key = rwkv::testing::S3Server::kSecretKey;
    return options;
  }
  static PostgresPool::Options Postgres() {
    PostgresPool::Options options;
    options.url = SharedPostgres().url();
    options.password = SharedPostgres().password();
    return options;
  }
  static absl::Status Execute(const std::string& sql) {
    const auto connection = PostgresConnection::Open(Postgres().url, Postgres().password, absl::Seconds(10));
    if (!connection.ok()) return connection.status();
    return (*connection)->Execute(sql).status();
  }
  // The object of a record.
  std::string Object(const std::string& tenant, const v1::RecordInfo& info) {
    return absl::StrCat(SharedS3().bucket_folder(), "/", tenant, "%2F", info.snapshot_id(), "%2F", info.layer(), "-",
                        info.bytes(), "-", absl::Hex(info.crc32c(), absl::kZeroPad8));
  }
};

TEST_F(SharedStateStoreTest, AnyStoreServesAnySession) {
  TestStore a(Options("any")), b(Options("any"));
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, a.Create("s"));
  ASSERT_OK(b.AddTurn(lease, "r", {1, 2, 3}, {4}));
  EXPECT_THAT(a.Tokens("s"), IsOkAndHolds(ElementsAre(1, 2, 3, 4)));
  ASSERT_OK(b.AddSnapshot(lease, "any-x", 4));
  ASSERT_OK_AND_ASSIGN(const auto manifest, a.catalog().FindSnapshot("s", 4, kTestModel));
  ASSERT_TRUE(manifest.has_value());
  for (const v1::RecordInfo& info : manifest->records()) ASSERT_OK(a.records().Get(info));
  // A branch made by one has a parent made by the other, and numbers only grow, whoever gives them.
  ASSERT_OK(b.catalog().ForkSession("s", 2, "f"));
  ASSERT_OK(a.catalog().ForkSession("f", 1, "g"));
  uint64_t last = lease.fencing_token();
  for (int i = 0; i < 6; ++i) {
    TestStore& store = i % 2 == 0 ? a : b;
    ASSERT_OK_AND_ASSIGN(const LeaseGrant grant,
                         store.catalog().AcquireLease("s", "router-0", absl::StrCat("i", i), absl::Minutes(1)));
    EXPECT_GT(grant.lease.fencing_token(), last);
    last = grant.lease.fencing_token();
  }
  EXPECT_THAT(a.AddTurn(lease, "q", {5}, {6}), StatusIs(StatusCode::kAborted, HasSubstr("fencing token")));
  EXPECT_OK(CheckCatalogRows(a.rows(), 8));
}

TEST_F(SharedStateStoreTest, WritersInSeveralStoresDoNotDisturbEachOther) {
  TestStore stores[] = {TestStore(Options("many")), TestStore(Options("many"))};
  ASSERT_OK_AND_ASSIGN(const v1::Lease root, stores[0].Create("root"));
  ASSERT_OK(stores[0].AddTurn(root, "r", {1, 2, 3}, {4, 5, 6}));
  std::vector<std::thread> threads;
  std::atomic<int> failed{0};
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      TestStore& store = stores[i % 2];
      const std::string id = absl::StrCat("s", i);
      // Forks of one session are one family: their tree is changed by all of them.
      if (!store.catalog().ForkSession("root", 4, id).ok()) ++failed;
      const auto lease = store.Acquire(id);
      if (!lease.ok()) ++failed;
      if (!lease.ok()) return;
      for (uint32_t step = 0; step < 15; ++step) {
        if (!store.AddTurn(*lease, absl::StrCat("r", step), {step}, {step}).ok()) ++failed;
        if (!store.store().RewindSession(*lease, 3 + step % 3).ok()) ++failed;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failed, 0);
  EXPECT_OK(CheckCatalogRows(stores[0].rows(), 8));
  ASSERT_OK_AND_ASSIGN(const SessionPage page, stores[1].catalog().ListSessions(10, ""));
  EXPECT_EQ(page.sessions.size(), 5u);
}

TEST_F(SharedStateStoreTest, TenantsSeeTheirOwnSessionsOnly) {
  TestStore a(Options("one")), b(Options("two"));
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, a.Create("s"));
  ASSERT_OK(a.AddTurn(lease, "r", {1}, {2}));
  EXPECT_THAT(b.catalog().GetSession("s"), StatusIs(StatusCode::kNotFound));
  ASSERT_OK(b.Create("s").status());
  EXPECT_THAT(b.Tokens("s"), IsOkAndHolds(IsEmpty()));
  EXPECT_THAT(a.Tokens("s"), IsOkAndHolds(ElementsAre(1, 2)));
  ASSERT_OK_AND_ASSIGN(const SessionPage page, b.catalog().ListSessions(10, ""));
  EXPECT_EQ(page.sessions.size(), 1u);
}

TEST_F(SharedStateStoreTest, KillingPostgresLosesNothingThatWasAcknowledged) {
  TestStore a(Options("kill")), b(Options("kill"));
  constexpr int kThreads = 4;
  std::atomic<uint32_t> acknowledged[kThreads] = {};
  Background background;
  for (int i = 0; i < kThreads; ++i) {
    TestStore& store = i % 2 == 0 ? a : b;
    ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store.Create(absl::StrCat("s", i)));
    background.Run([&, i, lease] {
      for (uint32_t turn = 0; !background.ending();) {
        // A turn that failed may have happened in part; its request id makes it run once.
        NewTurn begin;
        const std::string request_id = absl::StrCat("r", turn);
        const std::vector<uint32_t> prompt = {turn};
        begin.request_id = request_id;
        begin.token_ids = prompt;
        begin.model_fingerprint = kTestModel;
        if (store.store().BeginTurn(lease, begin).ok()) acknowledged[i] = ++turn;
      }
    });
  }
  for (int kill = 0; kill < 3; ++kill) {
    const uint32_t before = acknowledged[0];
    ASSERT_TRUE(Eventually([&] { return acknowledged[0] >= before + 10; })) << "no turns in round " << kill;
    SharedPostgres().Kill();
    EXPECT_THAT(a.catalog().GetSession("s0"), StatusIs(StatusCode::kUnavailable, HasSubstr("PostgreSQL")));
    ASSERT_OK(SharedPostgres().Restart());
  }
  const uint32_t before = acknowledged[0];
  ASSERT_TRUE(Eventually([&] { return acknowledged[0] >= before + 5; })) << "turns do not go on";
  background.End();
  for (int i = 0; i < kThreads; ++i) {
    ASSERT_OK_AND_ASSIGN(const std::vector<uint32_t> tokens, b.Tokens(absl::StrCat("s", i)));
    ASSERT_GE(tokens.size(), acknowledged[i]);
    for (uint32_t t = 0; t < tokens.size(); ++t) ASSERT_EQ(tokens[t], t);
  }
  EXPECT_OK(CheckCatalogRows(a.rows(), 8));
}

TEST_F(SharedStateStoreTest, AStoreThatStartsWhilePostgresOrS3IsAwayWaits) {
  const std::unique_ptr<common::Metrics> metrics = *common::Metrics::Create("");
  common::SystemClock clock;
  SharedStateStore::Options options;
  options.catalog = Postgres();
  options.records = S3();
  options.tenant = "waits";
  std::vector<rwkv::testing::TestServer*> servers = {&SharedPostgres(), &SharedS3()};
  for (rwkv::testing::TestServer* const server : servers) {
    server->Kill();
    const auto stop = [] { return true; };
    EXPECT_THAT(SharedStateStore::CreateWhenReachable(options, &clock, metrics.get(), stop).status(),
                StatusIs(StatusCode::kCancelled));
    std::atomic<int> asked{0};
    absl::Status status = absl::UnknownError("still waiting");
    std::thread starting([&] {
      status = SharedStateStore::CreateWhenReachable(options, &clock, metrics.get(), [&] {
                 return ++asked, false;
               }).status();
    });
    EXPECT_TRUE(Eventually([&] { return asked > 5; }));
    EXPECT_OK(server->Restart());
    starting.join();
    EXPECT_OK(status);
  }
  // What will not pass is not waited for.
  options.records.secret_key = "wrong";
  EXPECT_THAT(SharedStateStore::CreateWhenReachable(options, &clock, metrics.get(), [] { return false; }).status(),
              StatusIs(StatusCode::kFailedPrecondition));
}

TEST_F(SharedStateStoreTest, ARowThatWasChangedIsDataLossAndNotOtherTokens) {
  TestStore store(Options("damage"));
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store.Create("s"));
  ASSERT_OK(store.AddTurn(lease, "r", {1, 2, 3}, {4}));
  ASSERT_OK_AND_ASSIGN(const v1::Lease other, store.Create("t"));
  ASSERT_OK(store.AddTurn(other, "r", {7}, {8}));
  // Logs begin with their branch; that of "s" is the older one.
  ASSERT_OK(
      Execute("UPDATE rwkv.rows SET value = set_byte(value, 1, get_byte(value, 1) # 1) WHERE key = (SELECT key FROM "
              "rwkv.rows WHERE position('\\x4064616d616765006c'::bytea in key) = 1 ORDER BY key LIMIT 1)"));
  EXPECT_THAT(store.Tokens("s"), StatusIs(StatusCode::kDataLoss, HasSubstr("checksum")));
  EXPECT_THAT(store.Tokens("t"), IsOkAndHolds(ElementsAre(7, 8)));
}

TEST_F(SharedStateStoreTest, WhatIsWrongWithTheDatabaseIsSaid) {
  PostgresPool::Options options = Postgres();
  options.url = "postgres://test:pass@127.0.0.1/postgres";
  EXPECT_THAT(PostgresRowStore::Open(options), StatusIs(StatusCode::kInvalidArgument, HasSubstr("holds a password")));
  options.url = "host";
  EXPECT_THAT(PostgresRowStore::Open(options), StatusIs(StatusCode::kInvalidArgument, HasSubstr("no PostgreSQL URL")));
  options = Postgres();
  options.password = "wrong";
  EXPECT_THAT(PostgresRowStore::Open(options),
              StatusIs(StatusCode::kFailedPrecondition, AllOf(HasSubstr("authentication"), Not(HasSubstr("wrong")))));
  options.url = "postgres://test@127.0.0.1:1/postgres";
  EXPECT_THAT(PostgresRowStore::Open(options), StatusIs(StatusCode::kUnavailable));
  ASSERT_OK(PostgresRowStore::Open(Postgres()).status());
  ASSERT_OK(Execute("INSERT INTO rwkv.migrations (version) VALUES (999)"));
  EXPECT_THAT(PostgresRowStore::Open(Postgres()),
              StatusIs(StatusCode::kFailedPrecondition, HasSubstr("version 999, while this build knows")));
  ASSERT_OK(Execute("DELETE FROM rwkv.migrations WHERE version = 999"));
}

// --- From a folder ---------------------------------------------------------------------------------------------------

TEST_F(SharedStateStoreTest, AMovedFolderIsServedAsItWas) {
  std::string folder;
  uint64_t fencing_token = 0;
  {
    TestStore from;
    folder = from.data_dir();
    ASSERT_OK_AND_ASSIGN(const v1::Lease lease, from.Create("s"));
    fencing_token = lease.fencing_token();
    ASSERT_OK(from.AddTurn(lease, "r", {1, 2, 3}, {4}));
    ASSERT_OK(from.AddSnapshot(lease, "moved-x", 4));
    ASSERT_OK(from.catalog().ForkSession("s", 2, "f"));
    ASSERT_OK(from.Import("i", "moved-y", 3, {7, 8, 9}, true).status());
  }
  SharedStateStore::Options to;
  to.catalog = Postgres();
  to.records = S3();
  to.tenant = "moved";
  std::vector<std::string> said;
  const auto say = [&](const std::string& line) { said.push_back(line); };
  ASSERT_OK(MoveStore(folder, to, say));
  EXPECT_THAT(said, ElementsAre(HasSubstr("3 sessions moved")));

  TestStore store(Options("moved"));
  EXPECT_OK(CheckCatalogRows(store.rows(), 8));
  EXPECT_THAT(store.Tokens("s"), IsOkAndHolds(ElementsAre(1, 2, 3, 4)));
  EXPECT_THAT(store.Tokens("f"), IsOkAndHolds(ElementsAre(1, 2)));
  EXPECT_THAT(store.Tokens("i"), IsOkAndHolds(ElementsAre(7, 8, 9)));
  for (const auto& [session, position] : {std::pair<const char*, uint64_t>{"s", 4}, {"i", 3}}) {
    ASSERT_OK_AND_ASSIGN(const auto manifest, store.catalog().FindSnapshot(session, position, kTestModel));
    ASSERT_TRUE(manifest.has_value()) << session;
    EXPECT_EQ(manifest->position(), position);
    EXPECT_GT(manifest->records_size(), 0);
    for (const v1::RecordInfo& info : manifest->records()) EXPECT_OK(store.records().Get(info));
  }
  store.clock().Advance(absl::Hours(1));
  // It goes on: numbers that were given are not given again.
  ASSERT_OK_AND_ASSIGN(const LeaseGrant grant, store.catalog().AcquireLease("s", "router-1", "2", absl::Minutes(1)));
  EXPECT_GT(grant.lease.fencing_token(), fencing_token);
  ASSERT_OK(store.AddTurn(grant.lease, "q", {5}, {6}));
  ASSERT_OK(store.catalog().ForkSession("s", 5, "g"));
  EXPECT_THAT(store.Tokens("g"), IsOkAndHolds(ElementsAre(1, 2, 3, 4, 5)));
  EXPECT_THAT(store.Tokens("f"), IsOkAndHolds(ElementsAre(1, 2)));
  EXPECT_OK(CheckCatalogRows(store.rows(), 8));

  EXPECT_THAT(MoveStore(folder, to, say), StatusIs(StatusCode::kFailedPrecondition, HasSubstr("sessions already")));
  EXPECT_THAT(store.Tokens("g"), IsOkAndHolds(ElementsAre(1, 2, 3, 4, 5)));
}

// --- Records in S3 ----------------------------------------------------------------------------------------------------

TEST_F(SharedStateStoreTest, ARecordIsWhatWasPutOrAnError) {
  TestStore store(Options("records"));
  RecordStore& records = store.records();
  for (const size_t bytes : {size_t{1}, size_t{4096}, size_t{3} << 20}) {
    const std::string data = TestRecordData(static_cast<uint32_t>(bytes), bytes);
    const v1::RecordInfo info = TestRecordInfo(absl::StrCat("x", bytes), 10, data);
    EXPECT_THAT(records.Check(info), StatusIs(StatusCode::kDataLoss, HasSubstr("does not exist")));
    EXPECT_THAT(records.Get(info), StatusIs(StatusCode::kNotFound));
    ASSERT_OK(records.Put(info, data));
    ASSERT_OK(records.Put(info, data));
    ASSERT_OK(records.Check(info));
    EXPECT_THAT(records.Get(info), IsOkAndHolds(data));
    const std::string other = TestRecordData(7, bytes + 1);
    const v1::RecordInfo differs = TestRecordInfo(absl::StrCat("x", bytes), 10, other);
    EXPECT_THAT(records.Put(differs, other), StatusIs(StatusCode::kAlreadyExists));
    EXPECT_THAT(records.Put(differs, data), StatusIs(StatusCode::kDataLoss));
    EXPECT_THAT(records.Get(differs), StatusIs(StatusCode::kDataLoss));
    EXPECT_THAT(records.Check(differs), StatusIs(StatusCode::kDataLoss));
  }
  const std::string data = TestRecordData(4096, 4096);
  const v1::RecordInfo info = TestRecordInfo("x4096", 10, data);
  const std::string object = Object("records", info);
  {
    std::fstream file(object, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(100);
    file.put(static_cast<char>(data[100] ^ 1));
  }
  EXPECT_THAT(records.Get(info), StatusIs(StatusCode::kDataLoss));
  std::filesystem::resize_file(object, 100);
  EXPECT_THAT(records.Get(info), StatusIs(StatusCode::kDataLoss));
  EXPECT_THAT(records.Check(info), StatusIs(StatusCode::kDataLoss));
  ASSERT_OK(records.Delete("x4096"));
  ASSERT_OK(records.Delete("x4096"));
  EXPECT_THAT(records.Get(info), StatusIs(StatusCode::kNotFound));
  std::vector<std::string> snapshots;
  ASSERT_OK(records.ForEach([&](const RecordStore::Stored& stored) { snapshots.push_back(stored.snapshot_id); }));
  EXPECT_THAT(snapshots, ElementsAre("x1", absl::StrCat("x", 3 << 20)));
  EXPECT_EQ(records.bytes(), 1 + (3 << 20));
}

TEST_F(SharedStateStoreTest, ListsAreReadInPages) {
  ASSERT_OK_AND_ASSIGN(const auto client, S3Client::Create(S3()));
  std::vector<std::string> keys, found;
  for (int i = 10; i < 25; ++i) keys.push_back(absl::StrCat("pages/a b+", i));
  for (const std::string& key : keys) ASSERT_OK(client->Put(key, absl::MakeConstSpan(key.data(), key.size())));
  ASSERT_OK(client->List(
      "pages/",
      [&](const S3Client::Object& object) {
        found.push_back(object.key);
        return true;
      },
      4));
  EXPECT_EQ(found, keys);
}

TEST_F(SharedStateStoreTest, WhatIsWrongWithTheBucketIsSaid) {
  const auto metrics = *common::Metrics::Create("");
  const auto create = [&](const S3Client::Options& options) -> absl::Status {
    auto client = S3Client::Create(options);
    if (!client.ok()) return client.status();
    return S3RecordStore::Create(*std::move(client), "", metrics.get()).status();
  };
  S3Client::Options options = S3();
  options.secret_key = "wrong";
  EXPECT_THAT(create(options), StatusIs(StatusCode::kFailedPrecondition, HasSubstr("SignatureDoesNotMatch")));
  options = S3();
  options.bucket = "nowhere";
  EXPECT_THAT(create(options), StatusIs(StatusCode::kFailedPrecondition, HasSubstr("NoSuchBucket")));
  options = S3();
  options.endpoint = "http://127.0.0.1:1";
  const absl::Time start = absl::Now();
  EXPECT_THAT(create(options), StatusIs(StatusCode::kUnavailable, HasSubstr("127.0.0.1:1")));
  EXPECT_LT(absl::Now() - start, absl::Seconds(20));
  options.endpoint = "127.0.0.1";
  EXPECT_THAT(create(options), StatusIs(StatusCode::kInvalidArgument, HasSubstr("http://")));
}

TEST_F(SharedStateStoreTest, KilledS3ComesBackWithEveryRecord) {
  TestStore store(Options("s3"));
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store.Create("s"));
  ASSERT_OK(store.AddTurn(lease, "r", {1, 2, 3}, {4}));
  ASSERT_OK(store.AddSnapshot(lease, "s3-x", 4));
  SharedS3().Kill();
  EXPECT_THAT(store.AddSnapshot(lease, "s3-y", 3), StatusIs(StatusCode::kUnavailable, HasSubstr("S3")));
  ASSERT_OK(store.AddTurn(lease, "q", {5}, {6}));  // Turns go on.
  ASSERT_OK(SharedS3().Restart());
  ASSERT_OK(store.AddSnapshot(lease, "s3-y", 3));
  ASSERT_OK_AND_ASSIGN(const auto manifest, store.catalog().FindSnapshot("s", 4, kTestModel));
  ASSERT_TRUE(manifest.has_value());
  for (const v1::RecordInfo& info : manifest->records()) ASSERT_OK(store.records().Get(info));
}

TEST_F(SharedStateStoreTest, ASnapshotWhoseRecordsAreBeingSweptCannotBeCommittedAnywhere) {
  TestStore a(Options("sweep")), b(Options("sweep"));
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, a.Create("s"));
  ASSERT_OK(a.AddTurn(lease, "r", {1, 2, 3}, {4}));
  EXPECT_THAT(b.catalog().CondemnSnapshot("sweep-x"), IsOkAndHolds(true));
  EXPECT_THAT(a.AddSnapshot(lease, "sweep-x", 4), StatusIs(StatusCode::kDataLoss, HasSubstr("being deleted")));
  ASSERT_OK(a.AddSnapshot(lease, "sweep-y", 4));
  EXPECT_THAT(b.catalog().CondemnSnapshot("sweep-y"), IsOkAndHolds(false));
  ASSERT_OK(b.catalog().ForgetCondemned(b.clock().Now() - absl::Seconds(1)));
  EXPECT_THAT(a.AddSnapshot(lease, "sweep-x", 4), StatusIs(StatusCode::kDataLoss));
  ASSERT_OK(b.catalog().ForgetCondemned(b.clock().Now()));
  ASSERT_OK(a.AddSnapshot(lease, "sweep-x", 4));
}

}  // namespace
}  // namespace rwkv::state_store
