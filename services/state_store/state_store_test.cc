#include "services/state_store/state_store.h"

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rocksdb/env.h"
#include "services/state_store/testing/background.h"
#include "services/state_store/testing/fault_file_system.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::StatusIs;

// A record store whose puts and deletes are another's, and whose durability is the test's.
class WatchedRecords final : public RecordStore {
 public:
  WatchedRecords(RecordStore* records, std::function<absl::Status()> make_durable)
      : records_(records), make_durable_(std::move(make_durable)) {}
  absl::Status Put(const v1::RecordInfo& info, absl::Span<const char> data) override {
    return records_->Put(info, data);
  }
  absl::Status Read(const v1::RecordInfo& info, absl::Span<char> to) override { return records_->Read(info, to); }
  absl::Status Check(const v1::RecordInfo& info) override { return records_->Check(info); }
  absl::Status MakeDurable() override { return make_durable_(); }
  absl::Status Delete(const std::string& snapshot_id) override {
    if (snapshot_id == undeletable) return absl::DataLossError("it cannot be deleted");
    return records_->Delete(snapshot_id);
  }
  absl::Status ForEach(absl::FunctionRef<void(const Stored&)> visit) override { return records_->ForEach(visit); }
  int64_t bytes() const override { return records_->bytes(); }

  std::string undeletable;  // A snapshot.

 private:
  RecordStore* const records_;
  const std::function<absl::Status()> make_durable_;
};

class StateStoreTest : public ::testing::Test {
 protected:
  StateStoreTest() : file_system_(std::make_shared<FaultFileSystem>()), env_(rocksdb::NewCompositeEnv(file_system_)) {
    TestStore::Options options;
    options.env = env_.get();
    store_ = std::make_unique<TestStore>(options);
  }

  // A manifest of two layers at `position`, whose records are not put yet.
  v1::SnapshotManifest Manifest(const std::string& snapshot_id, uint64_t position) {
    v1::SnapshotManifest manifest;
    manifest.set_snapshot_id(snapshot_id);
    manifest.set_session_id("s");
    manifest.set_position(position);
    manifest.set_model_fingerprint(kTestModel);
    for (int layer = 0; layer < 2; ++layer) {
      *manifest.add_records() = TestRecordInfo(snapshot_id, layer, Data(layer));
    }
    return manifest;
  }
  static std::string Data(int layer) { return TestRecordData(static_cast<uint32_t>(layer), 5000); }

  // What a crash of the machine would leave.
  std::unique_ptr<TestStore> Crash() {
    TestStore::Options options;
    options.data_dir = NewTestFolder() + "/image";
    file_system_->CopyAsAfterCrash(store_->data_dir(), options.data_dir);
    return std::make_unique<TestStore>(options);
  }

  const std::shared_ptr<FaultFileSystem> file_system_;
  const std::unique_ptr<rocksdb::Env> env_;
  std::unique_ptr<TestStore> store_;
};

TEST_F(StateStoreTest, SnapshotIsNotVisibleBeforeAllItsRecordsAreThere) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Create("s"));
  ASSERT_OK(store_->AddTurn(lease, "r", {1, 2, 3}, {4}));
  const v1::SnapshotManifest manifest = Manifest("x", 4);
  const std::string branch = store_->LogBranch("s");
  EXPECT_THAT(store_->store().CommitSnapshot(lease, branch, manifest),
              StatusIs(StatusCode::kDataLoss, HasSubstr("record x/0")));
  ASSERT_OK(store_->records().Put(manifest.records(0), Data(0)));
  EXPECT_THAT(store_->store().CommitSnapshot(lease, branch, manifest),
              StatusIs(StatusCode::kDataLoss, HasSubstr("record x/1")));
  EXPECT_THAT(store_->catalog().HasSnapshot("x"), IsOkAndHolds(false));
  ASSERT_OK(store_->records().Put(manifest.records(1), Data(1)));
  ASSERT_OK(store_->store().CommitSnapshot(lease, branch, manifest));
  EXPECT_THAT(store_->catalog().HasSnapshot("x"), IsOkAndHolds(true));
}

TEST_F(StateStoreTest, ManifestIsCommittedWhenItsRecordsAreDurableAndNotBefore) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Create("s"));
  ASSERT_OK(store_->AddTurn(lease, "r", {1, 2, 3}, {4}));
  const v1::SnapshotManifest manifest = Manifest("x", 4);
  for (int layer = 0; layer < 2; ++layer) ASSERT_OK(store_->records().Put(manifest.records(layer), Data(layer)));
  absl::Status durable = absl::UnavailableError("not durable");
  int asked = 0;
  WatchedRecords records(&store_->records(), [&] {
    ++asked;
    EXPECT_THAT(store_->catalog().HasSnapshot("x"), IsOkAndHolds(false));
    return durable;
  });
  StateStore store({}, &store_->catalog(), &records, &store_->clock(), &store_->metrics());
  EXPECT_THAT(store.CommitSnapshot(lease, store_->LogBranch("s"), manifest), StatusIs(StatusCode::kUnavailable));
  EXPECT_THAT(store_->catalog().HasSnapshot("x"), IsOkAndHolds(false));
  durable = absl::OkStatus();
  ASSERT_OK(store.CommitSnapshot(lease, store_->LogBranch("s"), manifest));
  EXPECT_THAT(store_->catalog().HasSnapshot("x"), IsOkAndHolds(true));
  EXPECT_EQ(asked, 2);
}

TEST_F(StateStoreTest, OnlyWhatNobodyCommittedIsDroppedWithoutASession) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Create("s"));
  ASSERT_OK(store_->AddTurn(lease, "r", {1, 2, 3}, {4}));
  const v1::SnapshotManifest manifest = Manifest("x", 4);
  for (int layer = 0; layer < 2; ++layer) ASSERT_OK(store_->records().Put(manifest.records(layer), Data(layer)));
  ASSERT_OK(store_->store().DropUncommitted("x"));
  EXPECT_THAT(store_->records().Get(manifest.records(0)), StatusIs(StatusCode::kNotFound));
  ASSERT_OK(store_->store().DropUncommitted("x"));
  // Whoever is about to commit it elsewhere, and has seen the records, comes too late.
  std::vector<std::string> freed;
  EXPECT_THAT(store_->catalog().CommitSnapshot(lease, store_->LogBranch("s"), manifest, &freed),
              StatusIs(StatusCode::kDataLoss));
  ASSERT_OK(store_->AddSnapshot(lease, "y", 4));
  EXPECT_THAT(store_->store().DropUncommitted("y"), StatusIs(StatusCode::kFailedPrecondition));
  EXPECT_THAT(store_->catalog().HasSnapshot("y"), IsOkAndHolds(true));
}

TEST_F(StateStoreTest, AnOrphanThatCannotBeSweptIsInNoOthersWay) {
  WatchedRecords records(&store_->records(), [] { return absl::OkStatus(); });
  StateStore store({}, &store_->catalog(), &records, &store_->clock(), &store_->metrics());
  for (const char* const id : {"a", "b", "c"}) {
    ASSERT_OK(store_->records().Put(Manifest(id, 4).records(0), Data(0)));
  }
  store_->clock().Advance(absl::Hours(1));
  records.undeletable = "b";
  EXPECT_THAT(store.SweepOrphans(), StatusIs(StatusCode::kDataLoss));
  for (const char* const id : {"a", "c"}) {
    EXPECT_THAT(store_->records().Get(Manifest(id, 4).records(0)), StatusIs(StatusCode::kNotFound)) << id;
  }
  records.undeletable = "";
  EXPECT_OK(store.SweepOrphans());
  EXPECT_THAT(store_->records().Get(Manifest("b", 4).records(0)), StatusIs(StatusCode::kNotFound));
}

TEST_F(StateStoreTest, ManifestThatLiesAboutARecordIsRefused) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Create("s"));
  ASSERT_OK(store_->AddTurn(lease, "r", {1, 2, 3}, {4}));
  v1::SnapshotManifest manifest = Manifest("x", 4);
  for (int layer = 0; layer < 2; ++layer) ASSERT_OK(store_->records().Put(manifest.records(layer), Data(layer)));
  manifest.mutable_records(1)->set_crc32c(manifest.records(1).crc32c() ^ 1);
  EXPECT_THAT(store_->store().CommitSnapshot(lease, store_->LogBranch("s"), manifest), StatusIs(StatusCode::kDataLoss));
}

TEST_F(StateStoreTest, CommittedSnapshotSurvivesACrashOfTheMachineWithItsRecords) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Create("s"));
  ASSERT_OK(store_->AddTurn(lease, "r", {1, 2, 3}, {4}));
  const v1::SnapshotManifest manifest = Manifest("x", 4);
  for (int layer = 0; layer < 2; ++layer) ASSERT_OK(store_->records().Put(manifest.records(layer), Data(layer)));
  // A crash between upload and commit: the records may be gone, the manifest is not there.
  EXPECT_THAT(Crash()->catalog().HasSnapshot("x"), IsOkAndHolds(false));
  ASSERT_OK(store_->store().CommitSnapshot(lease, store_->LogBranch("s"), manifest));
  const std::unique_ptr<TestStore> after = Crash();
  ASSERT_OK_AND_ASSIGN(const auto found, after->catalog().FindSnapshot("s", 4, kTestModel));
  ASSERT_TRUE(found.has_value());
  for (int layer = 0; layer < 2; ++layer)
    EXPECT_THAT(after->records().Get(found->records(layer)), IsOkAndHolds(Data(layer)));
}

TEST_F(StateStoreTest, AtEveryMomentOfACrashAcknowledgedTokensAndSnapshotsAreWhole) {
  constexpr int kSessions = 3;
  std::atomic<uint64_t> acknowledged[kSessions] = {};
  std::atomic<uint64_t> committed[kSessions] = {};
  Background background;
  for (int i = 0; i < kSessions; ++i) {
    ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Create(absl::StrCat("s", i)));
    background.Run([&, i, lease] {
      for (uint32_t turn = 0; !background.ending(); ++turn) {
        ASSERT_OK(store_->AddTurn(lease, absl::StrCat("r", turn), {turn * 2}, {turn * 2 + 1}));
        acknowledged[i] = turn * 2 + 2;
        if (turn % 4 != 3) continue;
        ASSERT_OK(store_->AddSnapshot(lease, absl::StrCat("x", i, ".", turn), turn * 2 + 2));
        committed[i] = turn * 2 + 2;
      }
    });
  }
  for (int crash = 0; crash < 6; ++crash) {
    const uint64_t start = committed[0];
    ASSERT_TRUE(Eventually([&] { return committed[0] >= start + 16; })) << "no snapshots come beyond " << committed[0];
    uint64_t tokens_before[kSessions], snapshot_before[kSessions];
    for (int i = 0; i < kSessions; ++i) {
      tokens_before[i] = acknowledged[i];
      snapshot_before[i] = committed[i];
    }
    const std::unique_ptr<TestStore> after = Crash();
    for (int i = 0; i < kSessions; ++i) {
      const std::string id = absl::StrCat("s", i);
      ASSERT_OK_AND_ASSIGN(const std::vector<uint32_t> tokens, after->Tokens(id));
      ASSERT_GE(tokens.size(), tokens_before[i]);
      for (size_t t = 0; t < tokens.size(); ++t) ASSERT_EQ(tokens[t], t);
      ASSERT_OK_AND_ASSIGN(const v1::Session session, after->catalog().GetSession(id));
      if (snapshot_before[i] > 0) {
        ASSERT_GT(session.snapshot_positions_size(), 0);
        ASSERT_GE(*session.snapshot_positions().rbegin(), snapshot_before[i]);
      }
      for (const uint64_t position : session.snapshot_positions()) {
        ASSERT_OK_AND_ASSIGN(const auto manifest, after->catalog().FindSnapshot(id, position, kTestModel));
        ASSERT_TRUE(manifest.has_value());
        for (const v1::RecordInfo& info : manifest->records()) ASSERT_OK(after->records().Get(info));
      }
    }
    ASSERT_OK(CheckCatalogRows(after->rows(), 8));
  }
  background.End();
}

TEST_F(StateStoreTest, OrphansAreSweptByAgeAndNothingElseIs) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Create("s"));
  ASSERT_OK(store_->AddTurn(lease, "r", {1, 2, 3}, {4}));
  ASSERT_OK(store_->AddSnapshot(lease, "committed", 4));
  const v1::SnapshotManifest old = Manifest("old", 3), young = Manifest("young", 2);
  ASSERT_OK(store_->records().Put(old.records(0), Data(0)));
  store_->clock().Advance(absl::Minutes(59));
  ASSERT_OK(store_->store().SweepOrphans());
  EXPECT_THAT(store_->records().Check(old.records(0)), IsOk());
  ASSERT_OK(store_->records().Put(young.records(0), Data(0)));
  store_->clock().Advance(absl::Minutes(1));
  ASSERT_OK(store_->store().SweepOrphans());
  EXPECT_THAT(store_->records().Check(old.records(0)), StatusIs(StatusCode::kDataLoss));
  EXPECT_THAT(store_->records().Check(young.records(0)), IsOk());
  store_->clock().Advance(absl::Hours(24));
  ASSERT_OK(store_->store().SweepOrphans());
  EXPECT_EQ(store_->RecordKeys().size(), 4u);
  ASSERT_OK_AND_ASSIGN(const auto found, store_->catalog().FindSnapshot("s", 4, kTestModel));
  ASSERT_TRUE(found.has_value());
  EXPECT_THAT(store_->records().Get(found->records(0)), IsOk());
}

TEST_F(StateStoreTest, WhatBecomesOfSnapshotsIsCounted) {
  const auto counter = [&](const char* what) {
    return store_->metrics().Counter(absl::StrCat("rwkv_state_store_", what, "_total"), "").Value();
  };
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Create("s"));
  ASSERT_OK(store_->AddTurn(lease, "r", {1, 2, 3}, {4}));
  for (uint64_t position = 1; position <= 4; ++position) {
    ASSERT_OK(store_->AddSnapshot(lease, absl::StrCat("at", position), position));
  }
  EXPECT_EQ(counter("snapshots_committed"), 4);
  EXPECT_THAT(store_->store().DropSnapshot("s", "at2", "corrupt"), IsOkAndHolds(true));
  EXPECT_THAT(store_->store().DropSnapshot("s", "at2", "again"), IsOkAndHolds(false));
  EXPECT_EQ(counter("snapshots_dropped"), 1);
  EXPECT_EQ(counter("snapshots_freed"), 1);
  ASSERT_OK(store_->store().RewindSession(lease, 2));
  EXPECT_EQ(counter("snapshots_freed"), 3);
  const v1::SnapshotManifest orphan = Manifest("orphan", 2);
  ASSERT_OK(store_->records().Put(orphan.records(0), Data(0)));
  store_->clock().Advance(absl::Hours(1));
  ASSERT_OK(store_->store().SweepOrphans());
  ASSERT_OK(store_->store().SweepOrphans());
  EXPECT_EQ(counter("orphans"), 1);
}

TEST_F(StateStoreTest, RecordsOfASnapshotThatWasFreedBeforeACrashAreOrphans) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Create("s"));
  ASSERT_OK(store_->AddTurn(lease, "r", {1, 2, 3}, {4}));
  ASSERT_OK(store_->AddSnapshot(lease, "x", 4));
  // As if the process died between the catalog's part of a delete and the records'.
  std::vector<std::string> freed;
  ASSERT_OK(store_->catalog().DeleteSession(lease, &freed));
  EXPECT_THAT(freed, testing::ElementsAre("x"));
  ASSERT_OK(store_->Reopen());
  EXPECT_EQ(store_->RecordKeys().size(), 4u);
  store_->clock().Advance(absl::Hours(1));
  ASSERT_OK(store_->store().SweepOrphans());
  EXPECT_THAT(store_->RecordKeys(), IsEmpty());
}

TEST_F(StateStoreTest, FullDiskLosesNothingThatWasAcknowledged) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Create("s"));
  ASSERT_OK(store_->AddTurn(lease, "r", {1, 2, 3}, {4}));
  ASSERT_OK(store_->AddSnapshot(lease, "x", 4));
  file_system_->FailWritesWith(rocksdb::IOStatus::NoSpace("No space left on device"));
  EXPECT_THAT(store_->AddTurn(lease, "q", {5}, {6}),
              StatusIs(StatusCode::kResourceExhausted, HasSubstr(store_->data_dir())));
  EXPECT_THAT(store_->AddSnapshot(lease, "y", 3), StatusIs(StatusCode::kResourceExhausted));
  EXPECT_THAT(store_->store().DeleteSession(lease), StatusIs(StatusCode::kResourceExhausted));
  EXPECT_THAT(store_->Tokens("s"), IsOkAndHolds(testing::ElementsAre(1, 2, 3, 4)));
  ASSERT_OK_AND_ASSIGN(const auto found, store_->catalog().FindSnapshot("s", 4, kTestModel));
  ASSERT_TRUE(found.has_value());
  EXPECT_THAT(store_->records().Get(found->records(1)), IsOk());
  file_system_->FailWritesWith(rocksdb::IOStatus::OK());
  ASSERT_OK(store_->AddTurn(lease, "q", {5}, {6}));
  EXPECT_THAT(Crash()->Tokens("s"), IsOkAndHolds(testing::ElementsAre(1, 2, 3, 4, 5, 6)));
}

TEST_F(StateStoreTest, ChangeThatFailedAndYetHappenedBreaksNothing) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_->Create("s"));
  ASSERT_OK(store_->AddTurn(lease, "r", {1, 2, 3}, {4}));
  ASSERT_OK(store_->AddSnapshot(lease, "x", 4));
  const auto fail_syncs = [&](bool fail) {
    file_system_->FailSyncsWith(fail ? rocksdb::IOStatus::IOError("Input/output error") : rocksdb::IOStatus::OK());
  };
  fail_syncs(true);
  EXPECT_THAT(store_->store().RewindSession(lease, 2), StatusIs(StatusCode::kUnavailable));
  EXPECT_THAT(store_->Tokens("s"), IsOkAndHolds(testing::ElementsAre(1, 2, 3, 4)));
  fail_syncs(false);
  // Opening the files again finds the rewind in the log. Whether or not it does, all that follows builds on what it
  // found.
  ASSERT_OK(store_->database().TryResume());
  ASSERT_OK_AND_ASSIGN(std::vector<uint32_t> tokens, store_->Tokens("s"));
  EXPECT_THAT(tokens, testing::AnyOf(testing::ElementsAre(1, 2), testing::ElementsAre(1, 2, 3, 4)));
  ASSERT_OK(store_->AddTurn(lease, "q", {5}, {6}));
  tokens.insert(tokens.end(), {5, 6});
  EXPECT_THAT(store_->Tokens("s"), IsOkAndHolds(tokens));
  ASSERT_OK(CheckCatalogRows(store_->rows(), 8));
}

TEST_F(StateStoreTest, FsyncsThatFailAmidManyWritersBreakNothing) {
  constexpr int kThreads = 4;
  std::atomic<int> done{0};
  std::vector<v1::Lease> leases;
  ASSERT_OK_AND_ASSIGN(const v1::Lease root, store_->Create("root"));
  ASSERT_OK(store_->AddTurn(root, "r", {1, 2, 3}, {4, 5, 6}));
  for (int i = 0; i < kThreads; ++i) {
    const std::string id = absl::StrCat("s", i);
    ASSERT_OK(store_->catalog().ForkSession("root", 4, id));
    ASSERT_OK_AND_ASSIGN(leases.emplace_back(), store_->Acquire(id));
  }
  Background background;
  for (int i = 0; i < kThreads; ++i) {
    background.Run([&, i] {
      const std::string id = absl::StrCat("s", i);
      for (uint32_t step = 0; !background.ending(); ++step) {
        // Any of these may fail, and any that failed may have happened.
        bool ok = store_->AddTurn(leases[i], absl::StrCat("r", step), {step}, {step}).ok();
        ok &= store_->AddSnapshot(leases[i], absl::StrCat("x", i, ".", step), 3).ok();
        ok &= store_->store().RewindSession(leases[i], step % 7).ok();
        ok &= store_->catalog().ForkSession(id, absl::nullopt, absl::StrCat(id, ".", step % 3)).ok();
        if (const auto fork = store_->Acquire(absl::StrCat(id, ".", step % 3)); fork.ok() && step % 2 == 0) {
          ok &= store_->store().DeleteSession(*fork).ok();
        }
        if (ok) ++done;
      }
    });
  }
  for (int round = 0; round < 10; ++round) {
    file_system_->FailSyncsWith(rocksdb::IOStatus::IOError("Input/output error"));
    ASSERT_TRUE(Eventually([&] { return !store_->database().Sync().ok(); })) << "fsyncs that fail are taken for good";
    file_system_->FailSyncsWith(rocksdb::IOStatus::OK());
    const int start = done;
    ASSERT_TRUE(Eventually([&] { return done >= start + 3; })) << "nothing is done after round " << round;
  }
  background.End();
  ASSERT_OK(CheckCatalogRows(store_->rows(), 8));
  EXPECT_THAT(store_->Tokens("root"), IsOkAndHolds(testing::ElementsAre(1, 2, 3, 4, 5, 6)));
  ASSERT_OK(store_->Reopen());
  ASSERT_OK(CheckCatalogRows(store_->rows(), 8));
}

}  // namespace
}  // namespace rwkv::state_store
