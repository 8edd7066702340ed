#include "services/state_store/catalog/row_catalog.h"

#include <atomic>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rocksdb/env.h"
#include "services/common/grpc_status.h"
#include "services/state_store/testing/background.h"
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
using testing::StatusIs;

std::vector<uint32_t> Range(uint32_t begin, uint32_t end) {
  std::vector<uint32_t> tokens(end - begin);
  std::iota(tokens.begin(), tokens.end(), begin);
  return tokens;
}

NewTurn Turn(absl::string_view request_id, absl::Span<const uint32_t> token_ids, absl::string_view model = kTestModel) {
  NewTurn turn;
  turn.request_id = request_id;
  turn.token_ids = token_ids;
  turn.spec = "spec";
  turn.model_fingerprint = model;
  return turn;
}

class RowCatalogTest : public ::testing::Test {
 protected:
  ~RowCatalogTest() override { EXPECT_OK(CheckCatalogRows(store_.rows(), 8)); }

  Catalog& catalog() { return store_.catalog(); }
  std::vector<uint64_t> SnapshotPositions(const std::string& session_id) {
    const absl::StatusOr<v1::Session> session = catalog().GetSession(session_id);
    if (!session.ok()) return {};
    return {session->snapshot_positions().begin(), session->snapshot_positions().end()};
  }
  // Id of the newest at or before, "" if none, or the error.
  std::string Find(const std::string& session_id, uint64_t at_or_before, const std::string& model = kTestModel) {
    const auto manifest = catalog().FindSnapshot(session_id, at_or_before, model);
    if (!manifest.ok()) return manifest.status().ToString();
    return manifest->has_value() ? (*manifest)->snapshot_id() : "";
  }

  TestStore store_;
};

TEST_F(RowCatalogTest, SessionIsCreatedOnce) {
  ASSERT_OK_AND_ASSIGN(const v1::Session session, catalog().CreateSession("s", ""));
  EXPECT_EQ(session.id(), "s");
  EXPECT_EQ(session.token_count(), 0u);
  EXPECT_EQ(session.create_time().seconds(), absl::ToUnixSeconds(store_.clock().Now()));
  EXPECT_THAT(catalog().CreateSession("s", ""), StatusIs(StatusCode::kAlreadyExists, HasSubstr("session s")));
  EXPECT_THAT(catalog().GetSession("t"), StatusIs(StatusCode::kNotFound, HasSubstr("session t")));
}

TEST_F(RowCatalogTest, SessionsAreListedById) {
  for (const char* id : {"b", "a:2", "a", "c", "a.1"}) ASSERT_OK(catalog().CreateSession(id, ""));
  ASSERT_OK_AND_ASSIGN(const SessionPage first, catalog().ListSessions(2, ""));
  ASSERT_EQ(first.sessions.size(), 2u);
  EXPECT_EQ(first.sessions[0].id(), "a");
  EXPECT_EQ(first.sessions[1].id(), "a.1");
  EXPECT_EQ(first.next_page_token, "a.1");
  ASSERT_OK_AND_ASSIGN(const SessionPage second, catalog().ListSessions(3, first.next_page_token));
  ASSERT_EQ(second.sessions.size(), 3u);
  EXPECT_EQ(second.sessions[0].id(), "a:2");
  EXPECT_EQ(second.sessions[2].id(), "c");
  EXPECT_EQ(second.next_page_token, "");
}

TEST_F(RowCatalogTest, TurnIsAppendedAndRemembered) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  const std::vector<uint32_t> prompt = {1, 2, 3};
  ASSERT_OK_AND_ASSIGN(const TurnStart start, catalog().BeginTurn(lease, Turn("r", prompt)));
  EXPECT_FALSE(start.existed);
  EXPECT_EQ(start.session_tokens, 3u);
  EXPECT_EQ(start.turn.state(), v1::TURN_STATE_OPEN);
  ASSERT_OK_AND_ASSIGN(v1::Session session, catalog().GetSession("s"));
  EXPECT_EQ(session.open_request_id(), "r");
  EXPECT_EQ(session.model_fingerprint(), kTestModel);

  ASSERT_OK(AppendOne(catalog(), TestAppend(lease, "r", 3, {4})));
  v1::AppendItem last = TestAppend(lease, "r", 4, {5, 6}, v1::FINISH_REASON_STOP_STRING);
  last.set_stop_token_id(0);
  last.set_stop_string("\n\n");
  ASSERT_OK(AppendOne(catalog(), last));
  EXPECT_THAT(store_.Tokens("s"), IsOkAndHolds(ElementsAre(1, 2, 3, 4, 5, 6)));

  ASSERT_OK_AND_ASSIGN(const TurnStart again, catalog().BeginTurn(lease, Turn("r", {})));
  EXPECT_TRUE(again.existed);
  EXPECT_EQ(again.session_tokens, 6u);
  EXPECT_EQ(again.turn.begin(), 0u);
  EXPECT_EQ(again.turn.prompt_count(), 3u);
  EXPECT_EQ(again.turn.token_count(), 3u);
  EXPECT_EQ(again.turn.state(), v1::TURN_STATE_FINISHED);
  EXPECT_EQ(again.turn.finish_reason(), v1::FINISH_REASON_STOP_STRING);
  EXPECT_EQ(again.turn.stop_string(), "\n\n");
  EXPECT_TRUE(again.turn.has_stop_token_id());
  EXPECT_EQ(again.turn.spec(), "spec");
  EXPECT_THAT(again.turn.logprobs(), ElementsAre(-4, -5, -6));
}

TEST_F(RowCatalogTest, AFailedTurnKeepsItsError) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(catalog().BeginTurn(lease, Turn("r", Range(0, 3))));
  v1::AppendItem last = TestAppend(lease, "r", 3, {5}, v1::FINISH_REASON_ERROR);
  last.mutable_error()->set_code(13);
  last.mutable_error()->set_message("not finite");
  ASSERT_OK(AppendOne(catalog(), last));
  ASSERT_OK(store_.Reopen());
  ASSERT_OK_AND_ASSIGN(const TurnStart again, catalog().BeginTurn(lease, Turn("r", {})));
  EXPECT_EQ(again.turn.finish_reason(), v1::FINISH_REASON_ERROR);
  EXPECT_EQ(again.turn.error().code(), 13);
  EXPECT_EQ(again.turn.error().message(), "not finite");
  EXPECT_THAT(again.turn.logprobs(), ElementsAre(-5));
  // The session goes on after it.
  ASSERT_OK(store_.AddTurn(lease, "next", {6}, {7}));
  EXPECT_THAT(store_.Tokens("s"), IsOkAndHolds(ElementsAre(0, 1, 2, 5, 6, 7)));
}

TEST_F(RowCatalogTest, ATurnIsFoundByItsRequestIdOrAsTheNewest) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  EXPECT_THAT(catalog().FindTurn("t", "r1"), StatusIs(StatusCode::kNotFound, HasSubstr("session t")));
  ASSERT_OK_AND_ASSIGN(absl::optional<v1::Turn> none, catalog().FindTurn("s", ""));
  EXPECT_FALSE(none.has_value());
  ASSERT_OK(store_.AddTurn(lease, "r1", {1, 2}, {3}));
  ASSERT_OK(catalog().BeginTurn(lease, Turn("r2", {4})));
  ASSERT_OK(AppendOne(catalog(), TestAppend(lease, "r2", 4, {5, 6})));
  ASSERT_OK_AND_ASSIGN(const absl::optional<v1::Turn> first, catalog().FindTurn("s", "r1"));
  ASSERT_TRUE(first.has_value());
  EXPECT_EQ(first->state(), v1::TURN_STATE_FINISHED);
  EXPECT_EQ(first->token_count(), 1u);
  ASSERT_OK_AND_ASSIGN(const absl::optional<v1::Turn> newest, catalog().FindTurn("s", ""));
  ASSERT_TRUE(newest.has_value());
  EXPECT_EQ(newest->request_id(), "r2");
  EXPECT_EQ(newest->begin(), 3u);
  EXPECT_EQ(newest->state(), v1::TURN_STATE_OPEN);
  EXPECT_THAT(newest->logprobs(), ElementsAre(-5, -6));
  ASSERT_OK_AND_ASSIGN(none, catalog().FindTurn("s", "r3"));
  EXPECT_FALSE(none.has_value());
  ASSERT_OK_AND_ASSIGN(const v1::Session session, catalog().GetSession("s"));
  EXPECT_EQ(session.token_count(), 6u) << "nothing was begun";
}

TEST_F(RowCatalogTest, OpenTurnIsFoundAgainWithWhatItHasSoFar) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(catalog().BeginTurn(lease, Turn("r", Range(0, 3))));
  ASSERT_OK(AppendOne(catalog(), TestAppend(lease, "r", 3, {7, 8})));
  ASSERT_OK(store_.Reopen());
  ASSERT_OK_AND_ASSIGN(const TurnStart again, catalog().BeginTurn(lease, Turn("r", Range(0, 3))));
  EXPECT_TRUE(again.existed);
  EXPECT_EQ(again.turn.state(), v1::TURN_STATE_OPEN);
  EXPECT_EQ(again.turn.token_count(), 2u);
  EXPECT_THAT(again.turn.logprobs(), ElementsAre(-7, -8));
}

TEST_F(RowCatalogTest, AnotherOpenTurnEndsAsCancelled) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(catalog().BeginTurn(lease, Turn("r1", Range(0, 3))));
  ASSERT_OK(AppendOne(catalog(), TestAppend(lease, "r1", 3, {7})));
  ASSERT_OK(catalog().BeginTurn(lease, Turn("r2", Range(10, 12))));
  EXPECT_THAT(AppendOne(catalog(), TestAppend(lease, "r1", 6, {8})),
              StatusIs(StatusCode::kAborted, AllOf(HasSubstr("r1 is not open"), HasSubstr("r2"))));
  ASSERT_OK_AND_ASSIGN(const TurnStart first, catalog().BeginTurn(lease, Turn("r1", {})));
  EXPECT_EQ(first.turn.state(), v1::TURN_STATE_FINISHED);
  EXPECT_EQ(first.turn.finish_reason(), v1::FINISH_REASON_CANCELLED);
  EXPECT_EQ(first.turn.token_count(), 1u);
  EXPECT_THAT(store_.Tokens("s"), IsOkAndHolds(ElementsAre(0, 1, 2, 7, 10, 11)));
}

TEST_F(RowCatalogTest, AppendAtAnotherLengthIsAborted) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(catalog().BeginTurn(lease, Turn("r", Range(0, 3))));
  for (const uint64_t expected_length : {0u, 2u, 4u}) {
    EXPECT_THAT(
        AppendOne(catalog(), TestAppend(lease, "r", expected_length, {9})),
        StatusIs(StatusCode::kAborted, HasSubstr(absl::StrCat("session s has 3 tokens, not ", expected_length))));
  }
  EXPECT_THAT(store_.Tokens("s"), IsOkAndHolds(ElementsAre(0, 1, 2)));
}

TEST_F(RowCatalogTest, ItemsFailOneByOne) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease a, store_.Create("a"));
  ASSERT_OK_AND_ASSIGN(const v1::Lease b, store_.Create("b"));
  ASSERT_OK(catalog().BeginTurn(a, Turn("r", Range(0, 1))));
  ASSERT_OK(catalog().BeginTurn(b, Turn("r", Range(0, 1))));
  v1::Lease missing = a;
  missing.set_session_id("c");
  const v1::AppendItem good_a = TestAppend(a, "r", 1, {5}), bad_b = TestAppend(b, "r", 2, {6}),
                       bad_c = TestAppend(missing, "r", 1, {7});
  const std::vector<absl::Status> statuses = catalog().AppendTokens({&good_a, &bad_b, &bad_c});
  ASSERT_EQ(statuses.size(), 3u);
  EXPECT_THAT(statuses[0], IsOk());
  EXPECT_THAT(statuses[1], StatusIs(StatusCode::kAborted));
  EXPECT_THAT(statuses[2], StatusIs(StatusCode::kNotFound, HasSubstr("session c")));
  EXPECT_THAT(store_.Tokens("a"), IsOkAndHolds(ElementsAre(0, 5)));
  EXPECT_THAT(store_.Tokens("b"), IsOkAndHolds(ElementsAre(0)));
}

TEST_F(RowCatalogTest, OnlyTheLast64TurnsAreKept) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  for (uint32_t i = 0; i < 66; ++i) ASSERT_OK(store_.AddTurn(lease, absl::StrCat("r", i), {i}, {}));
  ASSERT_OK_AND_ASSIGN(TurnStart oldest, catalog().BeginTurn(lease, Turn("r2", {})));
  EXPECT_TRUE(oldest.existed);
  ASSERT_OK_AND_ASSIGN(TurnStart forgotten, catalog().BeginTurn(lease, Turn("r1", {})));
  EXPECT_FALSE(forgotten.existed);
}

TEST_F(RowCatalogTest, SessionBelongsToTheModelOfItsFirstTurn) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(lease, "r", {1}, {2}));
  EXPECT_THAT(catalog().BeginTurn(lease, Turn("q", {}, "another")),
              StatusIs(StatusCode::kFailedPrecondition, AllOf(HasSubstr(kTestModel), HasSubstr("another"))));
  ASSERT_OK(catalog().ForkSession("s", absl::nullopt, "f"));
  ASSERT_OK_AND_ASSIGN(const v1::Lease fork, store_.Acquire("f"));
  EXPECT_THAT(catalog().BeginTurn(fork, Turn("q", {}, "another")), StatusIs(StatusCode::kFailedPrecondition));
  ASSERT_OK(catalog().ForkSession("s", 0, "g"));
  ASSERT_OK_AND_ASSIGN(const v1::Lease empty, store_.Acquire("g"));
  EXPECT_THAT(catalog().BeginTurn(empty, Turn("q", {}, "another")), IsOk());
}

TEST_F(RowCatalogTest, LongInputIsReadBackFromAnyPosition) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  const std::vector<uint32_t> tokens = Range(0, 50000);
  ASSERT_OK(catalog().BeginTurn(lease, Turn("r", tokens)));
  for (const auto& [begin, end] : std::vector<std::pair<uint32_t, uint32_t>>{
           {0, 50000}, {0, 1}, {16383, 16385}, {16384, 32768}, {49999, 50000}, {50000, 50000}, {20000, 20000}}) {
    ASSERT_OK_AND_ASSIGN(const TokenPage page, catalog().ReadTokens("s", begin, end));
    EXPECT_EQ(page.token_ids, Range(begin, end)) << begin << " " << end;
  }
  EXPECT_THAT(catalog().ReadTokens("s", 0, 50001), StatusIs(StatusCode::kOutOfRange, HasSubstr("50000 tokens")));
}

// --- Leases ---------------------------------------------------------------------------------------------------------

TEST_F(RowCatalogTest, LeaseOfAnotherHolderIsWaitedFor) {
  ASSERT_OK(catalog().CreateSession("s", ""));
  ASSERT_OK_AND_ASSIGN(const LeaseGrant first, catalog().AcquireLease("s", "router-0", "1", absl::Seconds(10)));
  store_.clock().Advance(absl::Seconds(4));
  const auto refused = catalog().AcquireLease("s", "router-1", "1", absl::Seconds(10));
  EXPECT_THAT(refused, StatusIs(StatusCode::kAborted, HasSubstr("held by router-0")));
  EXPECT_EQ(common::GetRetryDelay(refused.status()), absl::Seconds(6));
  store_.clock().Advance(absl::Seconds(6));
  ASSERT_OK_AND_ASSIGN(const LeaseGrant second, catalog().AcquireLease("s", "router-1", "1", absl::Seconds(10)));
  EXPECT_GT(second.lease.fencing_token(), first.lease.fencing_token());
}

TEST_F(RowCatalogTest, NewIncarnationTakesOverAtOnceAndFencesTheOld) {
  ASSERT_OK(catalog().CreateSession("s", ""));
  ASSERT_OK_AND_ASSIGN(const LeaseGrant old, catalog().AcquireLease("s", "router-0", "1", absl::Minutes(1)));
  ASSERT_OK(catalog().BeginTurn(old.lease, Turn("r", Range(0, 2))));
  ASSERT_OK_AND_ASSIGN(const LeaseGrant now, catalog().AcquireLease("s", "router-0", "2", absl::Minutes(1)));
  ASSERT_GT(now.lease.fencing_token(), old.lease.fencing_token());
  EXPECT_EQ(now.session.open_request_id(), "r");

  const auto is_fenced = StatusIs(StatusCode::kAborted, AllOf(HasSubstr(absl::StrCat(old.lease.fencing_token())),
                                                              HasSubstr(absl::StrCat(now.lease.fencing_token()))));
  std::vector<std::string> freed;
  EXPECT_THAT(AppendOne(catalog(), TestAppend(old.lease, "r", 2, {3})), is_fenced);
  EXPECT_THAT(catalog().BeginTurn(old.lease, Turn("q", {})), is_fenced);
  EXPECT_THAT(catalog().RewindSession(old.lease, 1, &freed), is_fenced);
  EXPECT_THAT(catalog().DeleteSession(old.lease, &freed), is_fenced);
  EXPECT_THAT(catalog().ReleaseLease(old.lease), is_fenced);
  EXPECT_THAT(store_.AddSnapshot(old.lease, "x", 1), is_fenced);
  ASSERT_OK_AND_ASSIGN(const std::vector<v1::Lease> lost,
                       catalog().RenewLeases({old.lease, now.lease}, absl::Minutes(1)));
  ASSERT_EQ(lost.size(), 1u);
  EXPECT_EQ(lost[0].fencing_token(), old.lease.fencing_token());
  EXPECT_THAT(AppendOne(catalog(), TestAppend(now.lease, "r", 2, {3})), IsOk());
}

TEST_F(RowCatalogTest, AcquiringAgainGivesTheSameTokenWhileTheLeaseLives) {
  ASSERT_OK(catalog().CreateSession("s", ""));
  ASSERT_OK_AND_ASSIGN(const LeaseGrant first, catalog().AcquireLease("s", "router-0", "1", absl::Seconds(10)));
  store_.clock().Advance(absl::Seconds(9));
  ASSERT_OK_AND_ASSIGN(const LeaseGrant again, catalog().AcquireLease("s", "router-0", "1", absl::Seconds(10)));
  EXPECT_EQ(again.lease.fencing_token(), first.lease.fencing_token());
  store_.clock().Advance(absl::Seconds(9));  // It was extended.
  EXPECT_THAT(catalog().AcquireLease("s", "router-1", "1", absl::Seconds(10)), StatusIs(StatusCode::kAborted));
  store_.clock().Advance(absl::Seconds(1));  // It expired.
  ASSERT_OK_AND_ASSIGN(const LeaseGrant later, catalog().AcquireLease("s", "router-0", "1", absl::Seconds(10)));
  EXPECT_GT(later.lease.fencing_token(), first.lease.fencing_token());
}

TEST_F(RowCatalogTest, RenewalKeepsALeaseEvenWhenLateAsLongAsNobodyTookIt) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  store_.clock().Advance(absl::Hours(1));
  EXPECT_THAT(catalog().RenewLeases({lease}, absl::Seconds(10)), IsOkAndHolds(IsEmpty()));
  EXPECT_THAT(catalog().AcquireLease("s", "router-1", "1", absl::Seconds(10)), StatusIs(StatusCode::kAborted));
  ASSERT_OK(catalog().BeginTurn(lease, Turn("r", Range(0, 1))));
}

TEST_F(RowCatalogTest, ReleasedLeaseWritesNothingAndIsFreeForOthers) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  EXPECT_EQ(catalog().counts().leases, 1);
  ASSERT_OK(catalog().ReleaseLease(lease));
  ASSERT_OK(catalog().ReleaseLease(lease));
  EXPECT_EQ(catalog().counts().leases, 0);
  EXPECT_THAT(catalog().BeginTurn(lease, Turn("r", {})), StatusIs(StatusCode::kAborted, HasSubstr("released")));
  ASSERT_OK_AND_ASSIGN(const LeaseGrant other, catalog().AcquireLease("s", "router-1", "1", absl::Seconds(10)));
  EXPECT_GT(other.lease.fencing_token(), lease.fencing_token());
  EXPECT_THAT(catalog().ReleaseLease(lease), StatusIs(StatusCode::kAborted));
}

TEST_F(RowCatalogTest, LeasesOutliveARestart) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.Reopen());
  EXPECT_THAT(catalog().AcquireLease("s", "router-1", "1", absl::Seconds(10)), StatusIs(StatusCode::kAborted));
  ASSERT_OK(catalog().BeginTurn(lease, Turn("r", Range(0, 1))));
  store_.clock().Advance(absl::Minutes(1));
  ASSERT_OK_AND_ASSIGN(const LeaseGrant other, catalog().AcquireLease("s", "router-1", "1", absl::Seconds(10)));
  EXPECT_GT(other.lease.fencing_token(), lease.fencing_token());
}

TEST_F(RowCatalogTest, TokenOfADeletedSessionDoesNotFitItsSuccessor) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease old, store_.Create("s"));
  std::vector<std::string> freed;
  ASSERT_OK(catalog().DeleteSession(old, &freed));
  ASSERT_OK(store_.Reopen());
  ASSERT_OK_AND_ASSIGN(const v1::Lease now, store_.Create("s"));
  EXPECT_GT(now.fencing_token(), old.fencing_token());
  EXPECT_THAT(catalog().BeginTurn(old, Turn("r", {})), StatusIs(StatusCode::kAborted));
}

TEST_F(RowCatalogTest, TokensGrowOverARestartHoweverManyWereGiven) {
  const std::unique_ptr<rocksdb::Env> env(rocksdb::NewMemEnv(rocksdb::Env::Default()));
  TestStore::Options options;
  options.data_dir = "/tokens_test";
  options.env = env.get();
  TestStore store(options);
  ASSERT_OK_AND_ASSIGN(v1::Lease last, store.Create("s"));
  for (int restart = 0; restart < 2; ++restart) {
    for (int i = 0; i < 1030; ++i) {  // More than are reserved at a time.
      ASSERT_OK(store.catalog().ReleaseLease(last));
      ASSERT_OK_AND_ASSIGN(const v1::Lease next, store.Acquire("s"));
      ASSERT_GT(next.fencing_token(), last.fencing_token());
      last = next;
    }
    ASSERT_OK(store.Reopen());
  }
  ASSERT_OK(store.catalog().ReleaseLease(last));
  ASSERT_OK_AND_ASSIGN(const v1::Lease next, store.Acquire("s"));
  EXPECT_GT(next.fencing_token(), last.fencing_token());
}

TEST_F(RowCatalogTest, LeasesTokensAndFencedChangesAreCounted) {
  const auto counter = [&](const char* name) { return store_.metrics().Counter(name, "").Value(); };
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.Acquire("s").status());
  ASSERT_OK(catalog().RenewLeases({lease}, absl::Minutes(1)));
  EXPECT_EQ(catalog().counts().leases, 1);
  ASSERT_OK(store_.AddTurn(lease, "r", {1, 2, 3}, {4, 5}));
  EXPECT_EQ(counter("rwkv_state_store_appended_tokens_total"), 5);
  EXPECT_EQ(store_.metrics().Gauge("rwkv_state_store_log_tokens", "").Value(), 5);
  ASSERT_OK(catalog().ReleaseLease(lease));
  EXPECT_EQ(catalog().counts().leases, 0);
  EXPECT_EQ(counter("rwkv_state_store_fenced_total"), 0);
  v1::Lease old = lease;
  old.set_fencing_token(lease.fencing_token() + 1);
  std::vector<std::string> freed;
  EXPECT_FALSE(AppendOne(catalog(), TestAppend(old, "r", 5, {6})).ok());
  EXPECT_FALSE(catalog().BeginTurn(old, Turn("q", {})).ok());
  EXPECT_FALSE(catalog().ReleaseLease(old).ok());
  EXPECT_FALSE(catalog().RewindSession(old, 1, &freed).ok());
  EXPECT_FALSE(catalog().DeleteSession(old, &freed).ok());
  EXPECT_EQ(counter("rwkv_state_store_fenced_total"), 5);
}

TEST_F(RowCatalogTest, OfTwoRacingHoldersOneWins) {
  for (int round = 0; round < 20; ++round) {
    const std::string id = absl::StrCat("s", round);
    ASSERT_OK(catalog().CreateSession(id, ""));
    absl::StatusOr<LeaseGrant> grants[2];
    std::thread other([&] { grants[0] = catalog().AcquireLease(id, "router-0", "1", absl::Minutes(1)); });
    grants[1] = catalog().AcquireLease(id, "router-1", "1", absl::Minutes(1));
    other.join();
    ASSERT_NE(grants[0].ok(), grants[1].ok());
    EXPECT_THAT(grants[grants[0].ok() ? 1 : 0], StatusIs(StatusCode::kAborted));
  }
}

TEST_F(RowCatalogTest, OfTwoIncarnationsThatRaceToAppendTheFencedOneAddsNothing) {
  ASSERT_OK(catalog().CreateSession("s", ""));
  ASSERT_OK_AND_ASSIGN(const LeaseGrant old, catalog().AcquireLease("s", "router-0", "1", absl::Minutes(1)));
  ASSERT_OK(catalog().BeginTurn(old.lease, Turn("r", Range(0, 1))));
  // The old one appends until it is refused, while the new one takes over and reads the length it goes on from.
  uint64_t acknowledged = 1;
  std::atomic<bool> refused{false};
  Background background;
  background.Run([&] {
    while (!background.ending() && !refused) {
      if (AppendOne(catalog(), TestAppend(old.lease, "r", acknowledged, {1})).ok()) {
        ++acknowledged;
      } else {
        refused = true;
      }
    }
  });
  ASSERT_OK_AND_ASSIGN(const LeaseGrant now, catalog().AcquireLease("s", "router-0", "2", absl::Minutes(1)));
  ASSERT_OK(AppendOne(catalog(), TestAppend(now.lease, "r", now.session.token_count(), {2})));
  EXPECT_TRUE(Eventually([&] { return refused.load(); })) << "the old incarnation goes on";
  background.End();
  EXPECT_EQ(now.session.token_count(), acknowledged);
  ASSERT_OK_AND_ASSIGN(const std::vector<uint32_t> tokens, store_.Tokens("s"));
  EXPECT_EQ(tokens.size(), acknowledged + 1);
  EXPECT_EQ(tokens.back(), 2u);
}

// --- Fork, rewind, delete -------------------------------------------------------------------------------------------

TEST_F(RowCatalogTest, ForkSharesTheLogAndThenTheyPart) {
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

TEST_F(RowCatalogTest, DeleteFreesWhatNobodySharesAndNothingElse) {
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

TEST_F(RowCatalogTest, RewindMovesToANewBranchAndFreesTheTail) {
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
  EXPECT_THAT(catalog().RewindSession(lease, 99, nullptr), StatusIs(StatusCode::kOutOfRange, HasSubstr("15 tokens")));
}

TEST_F(RowCatalogTest, RewindForgetsTheTurnsThatEndBeyondItAndNoOther) {
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

TEST_F(RowCatalogTest, RewindToTheEndChangesNothing) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(catalog().BeginTurn(lease, Turn("r", Range(0, 5))));
  const std::string branch = store_.LogBranch("s");
  ASSERT_OK_AND_ASSIGN(const v1::Session session, store_.store().RewindSession(lease, 5));
  EXPECT_EQ(session.open_request_id(), "r");
  EXPECT_EQ(store_.LogBranch("s"), branch);
}

TEST_F(RowCatalogTest, RewindToTheBeginningLeavesAnEmptyLog) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(lease, "r", Range(0, 5), {5}));
  ASSERT_OK(store_.AddSnapshot(lease, "at3", 3));
  ASSERT_OK(store_.store().RewindSession(lease, 0));
  EXPECT_THAT(store_.Tokens("s"), IsOkAndHolds(IsEmpty()));
  EXPECT_EQ(store_.CatalogKeys().size(), 3u);  // The session, its place among the idle, and its branch.
  EXPECT_THAT(store_.RecordKeys(), IsEmpty());
}

TEST_F(RowCatalogTest, RewindKeepsWhatAForkBeyondItShares) {
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

TEST_F(RowCatalogTest, ForksOfForksKeepNoBranchThatAddsNothing) {
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

// --- Snapshots ------------------------------------------------------------------------------------------------------

TEST_F(RowCatalogTest, NewestSnapshotAtOrBeforeIsFound) {
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

TEST_F(RowCatalogTest, ForkFindsTheSnapshotsOfThePartItShares) {
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

TEST_F(RowCatalogTest, SnapshotOfAnotherBranchPositionOrModelIsRefused) {
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

TEST_F(RowCatalogTest, CommittingAgainIsFineAndAnotherUnderTheSameIdIsNot) {
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

TEST_F(RowCatalogTest, NewerSnapshotOfAPositionReplacesTheOlder) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(lease, "r", Range(0, 10), {}));
  ASSERT_OK(store_.AddSnapshot(lease, "x", 5));
  ASSERT_OK(store_.AddSnapshot(lease, "y", 5));
  EXPECT_EQ(Find("s", 5), "y");
  EXPECT_EQ(catalog().counts().snapshots, 1);
  EXPECT_EQ(store_.RecordKeys().size(), 4u);
}

TEST_F(RowCatalogTest, OldSnapshotsGoUnlessAForkNeedsThem) {
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

TEST_F(RowCatalogTest, SnapshotRightAtAForkOutlivesTheParent) {
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

TEST_F(RowCatalogTest, RewindToASnapshotOfTheParentKeepsIt) {
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

TEST_F(RowCatalogTest, DroppedSnapshotIsGoneAndTheOlderOneServes) {
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

TEST_F(RowCatalogTest, TheInitialStateStaysWithTheSessionAndItsForks) {
  ASSERT_OK_AND_ASSIGN(const v1::Session created, catalog().CreateSession("s", "poet@1a2b3c4d"));
  EXPECT_EQ(created.initial_state(), "poet@1a2b3c4d");
  ASSERT_OK(catalog().CreateSession("plain", ""));
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Acquire("s"));
  ASSERT_OK(store_.AddTurn(lease, "r", Range(0, 10), Range(10, 20)));
  ASSERT_OK(catalog().ForkSession("s", 15, "f"));
  ASSERT_OK(catalog().ForkSession("s", 0, "from nothing"));  // It shares no token, and begins alike.
  ASSERT_OK(catalog().ForkSession("f", 3, "ff"));
  std::vector<std::string> freed;
  ASSERT_OK(catalog().RewindSession(lease, 0, &freed));
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

// --- Restart --------------------------------------------------------------------------------------------------------

TEST_F(RowCatalogTest, EverythingIsThereAfterARestart) {
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
  EXPECT_EQ(store_.records().bytes(), 12000);
  // Numbers given out before are not given out again.
  ASSERT_OK_AND_ASSIGN(const v1::Lease other, store_.Create("t"));
  EXPECT_GT(other.fencing_token(), lease.fencing_token());
}

TEST_F(RowCatalogTest, AnImportWithItsLogIsASessionLikeOthers) {
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

TEST_F(RowCatalogTest, AnImportOfARecordThatIsNotThereLeavesNothing) {
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
TEST_F(RowCatalogTest, TheBaseOfAnImportLivesAsLongAsAnybodyStandsOnIt) {
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

TEST_F(RowCatalogTest, ABaseMayHaveTheLogThatLedToIt) {
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

}  // namespace
}  // namespace rwkv::state_store
