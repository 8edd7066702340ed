// Catalog: fork, rewind, delete.
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/grpc_status.h"
#include "services/state_store/catalog/catalog_fixture.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::StatusIs;

TEST_P(CatalogTest, ForkSharesTheLogAndThenTheyPart) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(lease, "r", Range(0, 10), Range(10, 20)));
  const size_t rows = store_.CatalogKeys().size();
  ASSERT_OK_AND_ASSIGN(const v1::Session fork, catalog().ForkSession("s", 15, "f"));
  EXPECT_EQ(fork.forked_from(), "s");
  EXPECT_EQ(fork.fork_position(), 15u);
  EXPECT_EQ(fork.token_count(), 15u);
  EXPECT_EQ(fork.model_fingerprint(), kTestModel);
  // A session, its place among the idle, a branch and an edge: nothing is copied.
  EXPECT_EQ(store_.CatalogKeys().size(), rows + 4);
  ASSERT_OK_AND_ASSIGN(const v1::Lease fork_lease, store_.Acquire("f"));
  ASSERT_OK(store_.AddTurn(fork_lease, "q", {100}, {101}));
  ASSERT_OK(store_.AddTurn(lease, "q", {200}, {201}));
  std::vector<uint32_t> want = Range(0, 20);
  want.insert(want.end(), {200, 201});
  EXPECT_THAT(store_.Tokens("s"), IsOkAndHolds(want));
  want = Range(0, 15);
  want.insert(want.end(), {100, 101});
  EXPECT_THAT(store_.Tokens("f"), IsOkAndHolds(want));
  EXPECT_THAT(catalog().ForkSession("s", 23, "g"), StatusIs(StatusCode::kOutOfRange, HasSubstr("22 tokens")));
  EXPECT_THAT(catalog().ForkSession("s", 1, "f"), StatusIs(StatusCode::kAlreadyExists));
  EXPECT_THAT(catalog().ForkSession("s", 1, "s"), StatusIs(StatusCode::kAlreadyExists));
  EXPECT_THAT(catalog().ForkSession("nobody", 1, "g"), StatusIs(StatusCode::kNotFound));
}

TEST_P(CatalogTest, DeleteFreesWhatNobodySharesAndNothingElse) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease s, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(s, "r", Range(0, 10), Range(10, 20)));
  ASSERT_OK(store_.AddSnapshot(s, "at8", 8));
  ASSERT_OK(store_.AddSnapshot(s, "at20", 20));
  ASSERT_OK(catalog().ForkSession("s", 15, "f"));
  ASSERT_OK_AND_ASSIGN(const v1::Lease f, store_.Acquire("f"));
  ASSERT_OK(store_.AddTurn(f, "q", {100}, {101}));
  ASSERT_OK(store_.AddSnapshot(f, "f17", 17));

  ASSERT_OK(store_.store().DeleteSession(s));
  EXPECT_THAT(catalog().GetSession("s"), StatusIs(StatusCode::kNotFound));
  std::vector<uint32_t> want = Range(0, 15);
  want.insert(want.end(), {100, 101});
  EXPECT_THAT(store_.Tokens("f"), IsOkAndHolds(want));
  EXPECT_THAT(SnapshotPositions("f"), ElementsAre(8, 17));
  ASSERT_OK_AND_ASSIGN(const auto at8, catalog().FindSnapshot("f", 16, kTestModel));
  ASSERT_TRUE(at8.has_value());
  EXPECT_THAT(store_.records().Get(at8->records(0)), IsOk());
  EXPECT_THAT(catalog().HasSnapshot("at20"), IsOkAndHolds(false));
  EXPECT_EQ(store_.RecordKeys().size(), 2u * 2 * 2);  // Two snapshots, two layers, info and bytes.

  ASSERT_OK(store_.store().DeleteSession(f));
  EXPECT_THAT(store_.CatalogKeys(), IsEmpty());
  EXPECT_THAT(store_.RecordKeys(), IsEmpty());
  EXPECT_EQ(store_.records().bytes(), 0);
  EXPECT_EQ(catalog().counts().sessions, 0);
  EXPECT_EQ(catalog().counts().snapshots, 0);
  EXPECT_EQ(catalog().counts().leases, 0);
}

TEST_P(CatalogTest, RewindMovesToANewBranchAndFreesTheTail) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(lease, "r1", Range(0, 5), Range(5, 10)));
  ASSERT_OK(store_.AddTurn(lease, "r2", Range(10, 15), Range(15, 20)));
  ASSERT_OK(store_.AddSnapshot(lease, "at10", 10));
  ASSERT_OK(store_.AddSnapshot(lease, "at20", 20));
  ASSERT_OK(catalog().BeginTurn(lease, Turn("r3", Range(20, 22))));
  const std::string branch = store_.LogBranch("s");

  ASSERT_OK_AND_ASSIGN(const v1::Session session, store_.store().RewindSession(lease, 12));
  EXPECT_EQ(session.token_count(), 12u);
  EXPECT_EQ(session.open_request_id(), "");
  EXPECT_THAT(session.snapshot_positions(), ElementsAre(10));
  EXPECT_NE(store_.LogBranch("s"), branch);
  EXPECT_THAT(store_.Tokens("s"), IsOkAndHolds(Range(0, 12)));
  EXPECT_THAT(catalog().HasSnapshot("at20"), IsOkAndHolds(false));
  // r1 ends at 10 and is known, r2 ended at 20 and is not.
  ASSERT_OK_AND_ASSIGN(const TurnStart known, catalog().BeginTurn(lease, Turn("r1", {})));
  EXPECT_TRUE(known.existed);
  EXPECT_THAT(known.turn.logprobs(), ElementsAre(-5, -6, -7, -8, -9));
  ASSERT_OK_AND_ASSIGN(const TurnStart unknown, catalog().BeginTurn(lease, Turn("r2", Range(30, 33))));
  EXPECT_FALSE(unknown.existed);
  EXPECT_EQ(unknown.turn.begin(), 12u);
  EXPECT_THAT(catalog().RewindSession(lease, 99, "", nullptr),
              StatusIs(StatusCode::kOutOfRange, HasSubstr("15 tokens")));
}

TEST_P(CatalogTest, RewindForgetsTheTurnsThatEndBeyondItAndNoOther) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(lease, "ends there", {1, 2}, {3, 4}));
  ASSERT_OK(store_.AddTurn(lease, "ends beyond", {}, {5}));
  ASSERT_OK(store_.store().RewindSession(lease, 4));
  ASSERT_OK_AND_ASSIGN(const auto kept, catalog().FindTurn("s", "ends there"));
  ASSERT_TRUE(kept.has_value());
  EXPECT_EQ(kept->token_count(), 2u);
  ASSERT_OK_AND_ASSIGN(const auto gone, catalog().FindTurn("s", "ends beyond"));
  EXPECT_FALSE(gone.has_value());
  // A client that sends its request id again gets its answer, and not another.
  ASSERT_OK_AND_ASSIGN(const TurnStart again, catalog().BeginTurn(lease, Turn("ends there", {1, 2})));
  EXPECT_TRUE(again.existed);
  EXPECT_EQ(again.session_tokens, 4u);
}

TEST_P(CatalogTest, RewindToTheEndChangesNothing) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(catalog().BeginTurn(lease, Turn("r", Range(0, 5))));
  const std::string branch = store_.LogBranch("s");
  ASSERT_OK_AND_ASSIGN(const v1::Session session, store_.store().RewindSession(lease, 5));
  EXPECT_EQ(session.open_request_id(), "r");
  EXPECT_EQ(store_.LogBranch("s"), branch);
}

TEST_P(CatalogTest, RewindToTheBeginningLeavesAnEmptyLog) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(lease, "r", Range(0, 5), {5}));
  ASSERT_OK(store_.AddSnapshot(lease, "at3", 3));
  ASSERT_OK(store_.store().RewindSession(lease, 0));
  EXPECT_THAT(store_.Tokens("s"), IsOkAndHolds(IsEmpty()));
  EXPECT_EQ(store_.CatalogKeys().size(), 3u);  // The session, its place among the idle, and its branch.
  EXPECT_THAT(store_.RecordKeys(), IsEmpty());
}

TEST_P(CatalogTest, RewindKeepsWhatAForkBeyondItShares) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(lease, "r", Range(0, 5), Range(5, 20)));
  ASSERT_OK(store_.AddSnapshot(lease, "at12", 12));
  ASSERT_OK(store_.AddSnapshot(lease, "at18", 18));
  ASSERT_OK(catalog().ForkSession("s", 16, "f"));
  ASSERT_OK(store_.store().RewindSession(lease, 4));
  EXPECT_THAT(store_.Tokens("s"), IsOkAndHolds(Range(0, 4)));
  EXPECT_THAT(store_.Tokens("f"), IsOkAndHolds(Range(0, 16)));
  EXPECT_THAT(SnapshotPositions("f"), ElementsAre(12));
  EXPECT_THAT(SnapshotPositions("s"), IsEmpty());
}

TEST_P(CatalogTest, ForksOfForksKeepNoBranchThatAddsNothing) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s0"));
  ASSERT_OK(store_.AddTurn(lease, "r", Range(0, 5), Range(5, 20)));
  // Each fork of the one before, and none adds a token: all hang from the first branch.
  for (int i = 1; i < 50; ++i) {
    ASSERT_OK(catalog().ForkSession(absl::StrCat("s", i - 1), absl::nullopt, absl::StrCat("s", i)));
  }
  // Rewinding again and again to the same place makes no chain either.
  for (int i = 0; i < 50; ++i) {
    ASSERT_OK(store_.AddTurn(lease, absl::StrCat("q", i), {7}, {8}));
    ASSERT_OK(store_.store().RewindSession(lease, 20));
  }
  EXPECT_OK(CheckCatalogRows(store_.rows(), 8));
  size_t branches = 0;
  for (const std::string& key : store_.CatalogKeys()) branches += key[0] == 'b';
  EXPECT_EQ(branches, 51u);  // The 50 heads and the one they share.
  EXPECT_THAT(store_.Tokens("s49"), IsOkAndHolds(Range(0, 20)));
}

// A copy of a rewind that comes late must not take away what came after.
TEST_P(CatalogTest, ARewindOfAnotherBranchIsDoneAlreadyOrAborted) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(lease, "r", Range(0, 20), {}));
  const std::string branch = store_.LogBranch("s");
  ASSERT_OK(store_.store().RewindSession(lease, 12, branch));
  ASSERT_NE(store_.LogBranch("s"), branch);
  // Its answer was lost, and it is sent again.
  ASSERT_OK_AND_ASSIGN(const v1::Session again, store_.store().RewindSession(lease, 12, branch));
  EXPECT_EQ(again.token_count(), 12);
  // The session has gone on.
  ASSERT_OK(store_.AddTurn(lease, "q", Range(50, 55), {}));
  EXPECT_THAT(store_.store().RewindSession(lease, 12, branch), StatusIs(StatusCode::kAborted, HasSubstr("branch")));
  EXPECT_THAT(store_.store().RewindSession(lease, 99, branch), StatusIs(StatusCode::kAborted, HasSubstr("branch")));
  ASSERT_OK_AND_ASSIGN(const std::vector<uint32_t> log, store_.Tokens("s"));
  EXPECT_EQ(log.size(), 17);
  ASSERT_OK(store_.store().RewindSession(lease, 12, store_.LogBranch("s")));
}

INSTANTIATE_TEST_SUITE_P(Engines, CatalogTest, ::testing::Bool(), EngineName);

}  // namespace
}  // namespace rwkv::state_store
