// Catalog: snapshots, imports, restarts.
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/grpc_status.h"
#include "services/state_store/catalog/catalog_fixture.h"
#include "services/state_store/catalog/keys.h"
#include "services/state_store/rows/numbers.h"
#include "services/state_store/rows/row_store.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::SizeIs;
using testing::StatusIs;

TEST_P(CatalogTest, NewestSnapshotAtOrBeforeIsFound) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(lease, "r", Range(0, 30), {}));
  for (const int position : {10, 20}) ASSERT_OK(store_.AddSnapshot(lease, absl::StrCat("at", position), position));
  EXPECT_EQ(Find("s", 9), "");
  EXPECT_EQ(Find("s", 10), "at10");
  EXPECT_EQ(Find("s", 19), "at10");
  EXPECT_EQ(Find("s", 1000), "at20");
  EXPECT_EQ(Find("s", UINT64_MAX), "at20");
  EXPECT_EQ(Find("s", 1000, "another"), "");
  EXPECT_THAT(Find("t", 1000), HasSubstr("NOT_FOUND"));
}

TEST_P(CatalogTest, ForkFindsTheSnapshotsOfThePartItShares) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease s, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(s, "r", Range(0, 30), {}));
  for (const int position : {10, 20, 30}) ASSERT_OK(store_.AddSnapshot(s, absl::StrCat("at", position), position));
  ASSERT_OK(catalog().ForkSession("s", 25, "f"));
  ASSERT_OK_AND_ASSIGN(const v1::Lease f, store_.Acquire("f"));
  EXPECT_EQ(Find("f", 1000), "at20");
  ASSERT_OK(store_.AddTurn(f, "r", Range(100, 110), {}));
  EXPECT_EQ(Find("f", 1000), "at20");  // Not at30, which is of other tokens.
  // One that the fork makes within the shared part serves both.
  ASSERT_OK(store_.AddSnapshot(f, "f22", 22));
  EXPECT_EQ(Find("s", 25), "f22");
  EXPECT_THAT(SnapshotPositions("s"), ElementsAre(10, 20, 22, 30));
  EXPECT_THAT(SnapshotPositions("f"), ElementsAre(10, 20, 22));
}

TEST_P(CatalogTest, SnapshotOfAnotherBranchPositionOrModelIsRefused) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(lease, "r", Range(0, 10), {}));
  EXPECT_THAT(store_.AddSnapshot(lease, "x", 11), StatusIs(StatusCode::kOutOfRange, HasSubstr("10 tokens")));
  v1::SnapshotManifest manifest;
  manifest.set_snapshot_id("y");
  manifest.set_session_id("s");
  manifest.set_position(5);
  manifest.set_model_fingerprint("another");
  std::vector<std::string> freed;
  const std::string branch = store_.LogBranch("s");
  EXPECT_THAT(catalog().CommitSnapshot(lease, branch, manifest, &freed),
              StatusIs(StatusCode::kFailedPrecondition, AllOf(HasSubstr(kTestModel), HasSubstr("another"))));
  manifest.set_model_fingerprint(kTestModel);
  ASSERT_OK(store_.store().RewindSession(lease, 8));
  EXPECT_THAT(catalog().CommitSnapshot(lease, branch, manifest, &freed),
              StatusIs(StatusCode::kAborted, HasSubstr(absl::StrCat("not ", branch))));
  EXPECT_THAT(SnapshotPositions("s"), IsEmpty());
}

TEST_P(CatalogTest, CommittingAgainIsFineAndAnotherUnderTheSameIdIsNot) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(lease, "r", Range(0, 10), {}));
  ASSERT_OK(store_.AddSnapshot(lease, "x", 5));
  ASSERT_OK(store_.AddSnapshot(lease, "x", 5));
  EXPECT_EQ(catalog().counts().snapshots, 1);
  v1::SnapshotManifest manifest;
  manifest.set_snapshot_id("x");
  manifest.set_session_id("s");
  manifest.set_position(6);
  manifest.set_model_fingerprint(kTestModel);
  std::vector<std::string> freed;
  EXPECT_THAT(catalog().CommitSnapshot(lease, store_.LogBranch("s"), manifest, &freed),
              StatusIs(StatusCode::kAlreadyExists, HasSubstr("position 5")));
}

TEST_P(CatalogTest, NewerSnapshotOfAPositionReplacesTheOlder) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(lease, "r", Range(0, 10), {}));
  ASSERT_OK(store_.AddSnapshot(lease, "x", 5));
  ASSERT_OK(store_.AddSnapshot(lease, "y", 5));
  EXPECT_EQ(Find("s", 5), "y");
  EXPECT_EQ(catalog().counts().snapshots, 1);
  EXPECT_EQ(store_.RecordKeys().size(), 4u);
}

TEST_P(CatalogTest, OldSnapshotsGoUnlessAForkNeedsThem) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease s, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(s, "r", Range(0, 100), {}));
  ASSERT_OK(store_.AddSnapshot(s, "at1", 1));
  ASSERT_OK(store_.AddSnapshot(s, "at2", 2));
  ASSERT_OK(store_.AddSnapshot(s, "at3", 3));
  ASSERT_OK(catalog().ForkSession("s", 2, "f"));
  for (int position = 10; position < 30; ++position) {
    ASSERT_OK(store_.AddSnapshot(s, absl::StrCat("at", position), position));
  }
  EXPECT_THAT(SnapshotPositions("s"), ElementsAre(2, 22, 23, 24, 25, 26, 27, 28, 29));
  EXPECT_EQ(Find("f", 100), "at2");
  EXPECT_EQ(store_.RecordKeys().size(), 9u * 4);
  // With the fork goes its need.
  ASSERT_OK_AND_ASSIGN(const v1::Lease f, store_.Acquire("f"));
  ASSERT_OK(store_.store().DeleteSession(f));
  EXPECT_THAT(SnapshotPositions("s"), ElementsAre(22, 23, 24, 25, 26, 27, 28, 29));
  EXPECT_EQ(store_.RecordKeys().size(), 8u * 4);
}

TEST_P(CatalogTest, SnapshotRightAtAForkOutlivesTheParent) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease parent, store_.Create("parent"));
  ASSERT_OK(store_.AddTurn(parent, "r", Range(0, 10), {10}));
  ASSERT_OK(store_.AddSnapshot(parent, "at5", 5));
  ASSERT_OK(catalog().ForkSession("parent", 5, "child"));
  ASSERT_OK(store_.store().DeleteSession(parent));
  ASSERT_OK_AND_ASSIGN(const auto found, catalog().FindSnapshot("child", 5, kTestModel));
  ASSERT_TRUE(found.has_value());
  EXPECT_EQ(found->snapshot_id(), "at5");
  EXPECT_THAT(store_.records().Get(found->records(1)), IsOk());
  EXPECT_EQ(catalog().counts().tokens, 5);
}

TEST_P(CatalogTest, RewindToASnapshotOfTheParentKeepsIt) {
  TestStore::Options options;
  options.snapshots_per_branch = 1;
  TestStore store(options);
  ASSERT_OK_AND_ASSIGN(const v1::Lease parent, store.Create("parent"));
  ASSERT_OK(store.AddTurn(parent, "r", Range(0, 10), {10}));
  ASSERT_OK(store.AddSnapshot(parent, "at4", 4));
  ASSERT_OK(store.catalog().ForkSession("parent", 5, "f"));
  ASSERT_OK(store.AddSnapshot(parent, "at8", 8));
  // The fork's branch goes and with it what needed the snapshot; the new one begins right at it.
  ASSERT_OK_AND_ASSIGN(const v1::Lease f, store.Acquire("f"));
  ASSERT_OK(store.store().RewindSession(f, 4));
  ASSERT_OK_AND_ASSIGN(const auto found, store.catalog().FindSnapshot("f", 4, kTestModel));
  ASSERT_TRUE(found.has_value());
  EXPECT_EQ(found->snapshot_id(), "at4");
  EXPECT_THAT(store.records().Get(found->records(0)), IsOk());
}

TEST_P(CatalogTest, DroppedSnapshotIsGoneAndTheOlderOneServes) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease s, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(s, "r", Range(0, 30), {}));
  ASSERT_OK(store_.AddSnapshot(s, "at10", 10));
  ASSERT_OK(store_.AddSnapshot(s, "at20", 20));
  ASSERT_OK(store_.Create("t"));
  EXPECT_THAT(store_.store().DropSnapshot("t", "at20", "?"), StatusIs(StatusCode::kNotFound, HasSubstr("session t")));
  EXPECT_THAT(store_.store().DropSnapshot("s", "at20", "corrupt"), IsOkAndHolds(true));
  EXPECT_THAT(store_.store().DropSnapshot("s", "at20", "corrupt"), IsOkAndHolds(false));
  EXPECT_EQ(Find("s", 100), "at10");
  EXPECT_EQ(store_.RecordKeys().size(), 4u);
}

TEST_P(CatalogTest, TheInitialStateStaysWithTheSessionAndItsForks) {
  ASSERT_OK_AND_ASSIGN(const v1::Session created, catalog().CreateSession("s", "poet@1a2b3c4d"));
  EXPECT_EQ(created.initial_state(), "poet@1a2b3c4d");
  ASSERT_OK(catalog().CreateSession("plain", ""));
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Acquire("s"));
  ASSERT_OK(store_.AddTurn(lease, "r", Range(0, 10), Range(10, 20)));
  ASSERT_OK(catalog().ForkSession("s", 15, "f"));
  ASSERT_OK(catalog().ForkSession("s", 0, "from nothing"));  // It shares no token, and begins alike.
  ASSERT_OK(catalog().ForkSession("f", 3, "ff"));
  std::vector<std::string> freed;
  ASSERT_OK(catalog().RewindSession(lease, 0, "", &freed));
  ASSERT_OK(store_.Reopen());
  for (const char* id : {"s", "f", "from nothing", "ff"}) {
    ASSERT_OK_AND_ASSIGN(const v1::Session session, catalog().GetSession(id));
    EXPECT_EQ(session.initial_state(), "poet@1a2b3c4d") << id;
  }
  ASSERT_OK_AND_ASSIGN(const SessionPage page, catalog().ListSessions(10, ""));
  for (const v1::Session& session : page.sessions) {
    EXPECT_EQ(session.initial_state(), session.id() == "plain" ? "" : "poet@1a2b3c4d") << session.id();
  }
  ASSERT_OK_AND_ASSIGN(const LeaseGrant grant, catalog().AcquireLease("f", "router-0", "1", absl::Minutes(1)));
  EXPECT_EQ(grant.session.initial_state(), "poet@1a2b3c4d");
}

TEST_P(CatalogTest, EverythingIsThereAfterARestart) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(lease, "r", Range(0, 30), Range(30, 40)));
  ASSERT_OK(store_.AddSnapshot(lease, "at10", 10));
  ASSERT_OK(catalog().ForkSession("s", 20, "f"));
  const std::vector<std::string> keys = store_.CatalogKeys();
  ASSERT_OK(store_.Reopen());
  EXPECT_EQ(store_.CatalogKeys(), keys);
  EXPECT_THAT(store_.Tokens("f"), IsOkAndHolds(Range(0, 20)));
  EXPECT_EQ(Find("f", 100), "at10");
  EXPECT_EQ(catalog().counts().sessions, 2);
  EXPECT_EQ(catalog().counts().snapshots, 1);
  EXPECT_EQ(catalog().counts().leases, 1);
  ASSERT_OK(store_.store().SweepOrphans());  // A shared store knows its bytes from then on.
  EXPECT_EQ(store_.records().bytes(), 12000);
  // Numbers given out before are not given out again.
  ASSERT_OK_AND_ASSIGN(const v1::Lease other, store_.Create("t"));
  EXPECT_GT(other.fencing_token(), lease.fencing_token());
}

TEST_P(CatalogTest, AnImportWithItsLogIsASessionLikeOthers) {
  ASSERT_OK_AND_ASSIGN(const v1::Session session, store_.Import("s", "x", 4, Range(10, 14), /*base=*/false));
  EXPECT_EQ(session.token_count(), 4u);
  EXPECT_EQ(session.model_fingerprint(), kTestModel);
  EXPECT_FALSE(session.has_base_position());
  EXPECT_THAT(session.snapshot_positions(), ElementsAre(4));
  EXPECT_THAT(SnapshotPositions("s"), ElementsAre(4));
  EXPECT_THAT(store_.Tokens("s"), IsOkAndHolds(ElementsAre(10, 11, 12, 13)));
  EXPECT_EQ(Find("s", 4), "x");
  EXPECT_EQ(Find("s", 3), "");
  EXPECT_THAT(store_.Import("s", "y", 4, Range(10, 14), false), StatusIs(StatusCode::kAlreadyExists));
  EXPECT_THAT(store_.Import("t", "x", 4, Range(10, 14), false), StatusIs(StatusCode::kAlreadyExists));
  ASSERT_OK(catalog().ForkSession("s", 2, "before"));
  EXPECT_THAT(store_.Tokens("before"), IsOkAndHolds(ElementsAre(10, 11)));
  EXPECT_THAT(store_.store().DropSnapshot("s", "x", "corrupt"), IsOkAndHolds(true));
}

TEST_P(CatalogTest, AnImportOfARecordThatIsNotThereLeavesNothing) {
  NewImport import;
  import.manifest.set_snapshot_id("x");
  import.manifest.set_session_id("s");
  import.manifest.set_model_fingerprint(kTestModel);
  *import.manifest.add_records() = TestRecordInfo("x", 0, "bytes");
  import.base = true;
  EXPECT_THAT(store_.store().ImportSession("s", import), StatusIs(StatusCode::kDataLoss));
  EXPECT_THAT(store_.CatalogKeys(), IsEmpty());
}

// The base stays through retention, drops, rewinds and the end of the session itself, until the last fork goes.
TEST_P(CatalogTest, TheBaseOfAnImportLivesAsLongAsAnybodyStandsOnIt) {
  for (const uint64_t position : {0, 5}) {
    SCOPED_TRACE(position);
    ASSERT_OK_AND_ASSIGN(const v1::Session session, store_.Import("s", "base", position, {}, /*base=*/true));
    EXPECT_EQ(session.base_position(), position);
    EXPECT_EQ(session.log_begin(), position);
    ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Acquire("s"));
    EXPECT_EQ(Find("s", position), "base");
    EXPECT_EQ(Find("s", position, "another-model"), "");
    EXPECT_THAT(catalog().BeginTurn(lease, Turn("r", {}, "another-model")), StatusIs(StatusCode::kFailedPrecondition));
    ASSERT_OK(store_.AddTurn(lease, "r", Range(0, 10), Range(10, 20)));
    const uint64_t end = position + 20;
    for (uint64_t at = position + 1; at <= end; ++at) ASSERT_OK(store_.AddSnapshot(lease, absl::StrCat("p", at), at));
    EXPECT_THAT(SnapshotPositions("s"), testing::SizeIs(1 + 8));  // Retention spares it.
    EXPECT_EQ(SnapshotPositions("s").front(), position);
    EXPECT_THAT(store_.store().DropSnapshot("s", "base", "corrupt"),
                StatusIs(StatusCode::kFailedPrecondition, HasSubstr("imported with")));
    EXPECT_THAT(store_.AddSnapshot(lease, absl::StrCat("at-base", position), position),
                StatusIs(StatusCode::kOutOfRange));
    if (position > 0) {
      EXPECT_THAT(
          catalog().ForkSession("s", position - 1, "f"),
          StatusIs(StatusCode::kOutOfRange, HasSubstr("imported state at position 5; it cannot be forked at 4")));
      EXPECT_THAT(store_.store().RewindSession(lease, position - 1),
                  StatusIs(StatusCode::kOutOfRange, HasSubstr("cannot be rewound to 4")));
      EXPECT_THAT(catalog().ReadTokens("s", position - 1, end),
                  StatusIs(StatusCode::kOutOfRange, HasSubstr("imported without its first 5 tokens")));
    }
    ASSERT_OK_AND_ASSIGN(const v1::Session fork, catalog().ForkSession("s", position, "at-base"));
    EXPECT_EQ(fork.base_position(), position);
    EXPECT_EQ(fork.model_fingerprint(), kTestModel);
    ASSERT_OK(catalog().ForkSession("s", position + 3, "later"));
    ASSERT_OK(catalog().ForkSession("at-base", position, "again"));
    ASSERT_OK(store_.store().RewindSession(lease, position));
    EXPECT_THAT(store_.Tokens("s"), IsOkAndHolds(IsEmpty()));
    EXPECT_THAT(store_.Tokens("later"), IsOkAndHolds(ElementsAre(0, 1, 2)));
    ASSERT_OK(CheckCatalogRows(store_.rows(), 8));
    ASSERT_OK(store_.Reopen());
    EXPECT_EQ(catalog().counts().snapshots, 1);  // The base: retention had left none as old as the fork "later".
    for (const char* id : {"s", "later", "at-base"}) {
      ASSERT_OK_AND_ASSIGN(const v1::Lease taken, store_.Acquire(id));
      ASSERT_OK(store_.store().DeleteSession(taken));
      ASSERT_OK(CheckCatalogRows(store_.rows(), 8));
      EXPECT_EQ(Find("again", position), "base");
    }
    ASSERT_OK_AND_ASSIGN(const v1::Lease last, store_.Acquire("again"));
    ASSERT_OK(store_.AddTurn(last, "r", {7}, {8}));
    EXPECT_THAT(store_.Tokens("again"), IsOkAndHolds(ElementsAre(7, 8)));
    ASSERT_OK(store_.store().DeleteSession(last));
    EXPECT_THAT(store_.CatalogKeys(), IsEmpty());
    EXPECT_EQ(catalog().counts().snapshots, 0);
    for (const std::string& key : store_.RecordKeys()) {  // Those of the snapshot that was refused.
      EXPECT_THAT(key, ::testing::StartsWith("at-base"));
    }
  }
}

TEST_P(CatalogTest, ABaseMayHaveTheLogThatLedToIt) {
  ASSERT_OK_AND_ASSIGN(const v1::Session session, store_.Import("s", "base", 4, Range(10, 14), /*base=*/true));
  EXPECT_EQ(session.log_begin(), 0u);
  EXPECT_THAT(store_.Tokens("s"), IsOkAndHolds(ElementsAre(10, 11, 12, 13)));
  EXPECT_THAT(store_.store().DropSnapshot("s", "base", "corrupt"), StatusIs(StatusCode::kFailedPrecondition));
  EXPECT_EQ(Find("s", 4), "base");
  EXPECT_THAT(catalog().ForkSession("s", 3, "f"), StatusIs(StatusCode::kOutOfRange));
  ASSERT_OK(catalog().ForkSession("s", 4, "f"));
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Acquire("s"));
  ASSERT_OK(store_.store().DeleteSession(lease));
  EXPECT_EQ(Find("f", 4), "base");
  EXPECT_THAT(store_.Tokens("f"), IsOkAndHolds(ElementsAre(10, 11, 12, 13)));
}

TEST_P(CatalogTest, TheSweepOfOrphansLeavesAStateThatALogStandsOnWhateverRowsOfItAreGone) {
  ASSERT_OK(store_.Import("s", "base", 5, {}, /*base=*/true));
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Acquire("s"));
  ASSERT_OK(store_.AddTurn(lease, "r", Range(0, 10), Range(10, 20)));
  ASSERT_OK(store_.AddSnapshot(lease, "at15", 15));
  ASSERT_OK(store_.AddSnapshot(lease, "at25", 25));
  const auto edit = [&](const std::function<void(RowTransaction&)>& change) {
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RowTransaction> rows, store_.rows().Begin({}));
    change(*rows);
    ASSERT_OK(rows->Commit());
  };
  std::map<std::string, std::string> lost;
  edit([&](RowTransaction& rows) {
    for (const char* id : {"base", "at15"}) {
      const std::string key = SnapshotIdKey(id);
      lost[key] = rows.Get(key)->value_or("");
      EXPECT_FALSE(lost[key].empty());
      rows.Delete(key);
    }
  });
  store_.clock().Advance(absl::Hours(24 * 365 * 50));  // S3 has a clock of its own.
  ASSERT_OK(store_.store().SweepOrphans());
  const auto readable = [&](uint64_t position) {
    const auto manifest = catalog().FindSnapshot("s", position, kTestModel);
    EXPECT_TRUE(manifest.ok() && manifest->has_value()) << position;
    if (!manifest.ok() || !manifest->has_value()) return false;
    return store_.records().Get((*manifest)->records(0)).ok() && store_.records().Get((*manifest)->records(1)).ok();
  };
  EXPECT_TRUE(readable(5)) << "it is nowhere else";
  EXPECT_FALSE(readable(15)) << "what came to it is in the log";
  EXPECT_TRUE(readable(25));
  EXPECT_THAT(store_.store().DropSnapshot("s", "at25", "corrupt"), IsOkAndHolds(true));
  EXPECT_THAT(store_.Tokens("s"), IsOkAndHolds(SizeIs(20)));
  ASSERT_OK(store_.store().SweepOrphans()) << "again";
  EXPECT_TRUE(readable(5));
  edit([&](RowTransaction& rows) {
    for (const auto& [key, row] : lost) rows.Put(key, row);
  });
}

TEST_P(CatalogTest, TheSweepOfOrphansLeavesRecordsWhoseManifestIsGone) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(lease, "r", Range(0, 10), Range(10, 20)));
  ASSERT_OK(store_.AddSnapshot(lease, "at10", 10));
  ASSERT_OK(store_.AddSnapshot(lease, "at20", 20));
  std::string key, row;
  for (const std::string& one : store_.CatalogKeys()) {
    if (one[0] == 'p' && NumberAt(one, 9) == 20) key = one;
  }
  ASSERT_FALSE(key.empty());
  const auto edit = [&](const std::function<void(RowTransaction&)>& change) {
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RowTransaction> rows, store_.rows().Begin({}));
    change(*rows);
    ASSERT_OK(rows->Commit());
  };
  edit([&](RowTransaction& rows) {
    row = rows.Get(key)->value_or("");
    rows.Delete(key);
  });
  ASSERT_FALSE(row.empty());
  store_.clock().Advance(absl::Hours(24 * 365 * 50));  // S3 has a clock of its own.
  const size_t records = store_.RecordKeys().size();
  ASSERT_OK(store_.store().SweepOrphans());
  EXPECT_EQ(store_.RecordKeys().size(), records) << "the id is one that was committed";
  EXPECT_EQ(Find("s", 20), "at10");
  EXPECT_THAT(store_.Tokens("s"), IsOkAndHolds(SizeIs(20)));
  edit([&](RowTransaction& rows) { rows.Put(key, row); });
  EXPECT_EQ(Find("s", 20), "at20");
}

INSTANTIATE_TEST_SUITE_P(Engines, CatalogTest, ::testing::Bool(), EngineName);

}  // namespace
}  // namespace rwkv::state_store
