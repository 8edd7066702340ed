// Catalog: sessions and their turns.
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/grpc_status.h"
#include "services/state_store/catalog/catalog_fixture.h"
#include "services/state_store/catalog/keys.h"
#include "services/state_store/rows/row_store.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::StatusIs;

TEST_P(CatalogTest, SessionIsCreatedOnce) {
  ASSERT_OK_AND_ASSIGN(const v1::Session session, catalog().CreateSession("s", ""));
  EXPECT_EQ(session.id(), "s");
  EXPECT_EQ(session.token_count(), 0u);
  EXPECT_EQ(session.create_time().seconds(), absl::ToUnixSeconds(store_.clock().Now()));
  EXPECT_THAT(catalog().CreateSession("s", ""), StatusIs(StatusCode::kAlreadyExists, HasSubstr("session s")));
  EXPECT_THAT(catalog().GetSession("t"), StatusIs(StatusCode::kNotFound, HasSubstr("session t")));
}

TEST_P(CatalogTest, SessionsAreListedById) {
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

TEST_P(CatalogTest, TenantsAreListedApart) {
  for (const char* id : {"b", "acme@b", "acme@a", "acme.eu@a", "c", "z@a", "a"}) {
    ASSERT_OK(catalog().CreateSession(id, ""));
  }
  const auto ids = [this](int page_size, const std::string& after) {
    std::vector<std::string> ids;
    const absl::StatusOr<SessionPage> page = catalog().ListSessions(page_size, after);
    EXPECT_THAT(page, IsOk());
    if (!page.ok()) return ids;
    for (const v1::Session& session : page->sessions) ids.push_back(session.id());
    if (!page->next_page_token.empty()) ids.push_back("and on from " + page->next_page_token);
    return ids;
  };
  EXPECT_THAT(ids(10, "acme@"), ElementsAre("acme@a", "acme@b"));
  EXPECT_THAT(ids(1, "acme@"), ElementsAre("acme@a", "and on from acme@a"));
  EXPECT_THAT(ids(1, "acme@a"), ElementsAre("acme@b"));
  EXPECT_THAT(ids(10, "acme.eu@"), ElementsAre("acme.eu@a"));
  EXPECT_THAT(ids(10, "acm@"), ElementsAre());
  EXPECT_THAT(ids(10, ""), ElementsAre("a", "b", "c"));
  EXPECT_THAT(ids(1, "a"), ElementsAre("b", "and on from b"));
}

TEST_P(CatalogTest, UsageIsWhatTurnsFedAndDrewWhateverBecameOfThem) {
  const auto turn = [this](const std::string& id, const std::string& request_id, uint32_t prompt, uint32_t drawn) {
    ASSERT_OK_AND_ASSIGN(const LeaseGrant grant, catalog().AcquireLease(id, "h", "i", absl::Seconds(9)));
    ASSERT_OK(catalog().BeginTurn(grant.lease, Turn(request_id, Range(0, prompt))));
    const uint64_t length = grant.session.token_count() + prompt;
    for (uint32_t i = 0; i < drawn; ++i) {
      ASSERT_OK(AppendOne(catalog(), TestAppend(grant.lease, request_id, length + i, {i})));
    }
  };
  const auto expect = [this](uint64_t turns, uint64_t prompt, uint64_t generated, int64_t sessions, int64_t log) {
    ASSERT_OK_AND_ASSIGN(const TenantUsage usage, catalog().GetUsage("acme"));
    EXPECT_EQ(usage.turns, turns);
    EXPECT_EQ(usage.prompt_tokens, prompt);
    EXPECT_EQ(usage.generated_tokens, generated);
    EXPECT_EQ(usage.sessions, sessions);
    EXPECT_EQ(usage.log_tokens, log);
  };
  for (const char* id : {"acme@a", "acme@b", "acme.eu@a", "a"}) ASSERT_OK(catalog().CreateSession(id, ""));
  expect(0, 0, 0, 2, 0);
  turn("acme@a", "r", 5, 3);
  turn("acme@b", "r", 2, 0);
  turn("acme.eu@a", "r", 100, 1);
  turn("a", "r", 1000, 1);
  expect(2, 7, 3, 2, 10);
  // A request that is known runs no second time.
  ASSERT_OK_AND_ASSIGN(LeaseGrant grant, catalog().AcquireLease("acme@a", "h", "i", absl::Seconds(9)));
  ASSERT_OK_AND_ASSIGN(const TurnStart again, catalog().BeginTurn(grant.lease, Turn("r", Range(0, 5))));
  EXPECT_TRUE(again.existed);
  expect(2, 7, 3, 2, 10);
  // What is shared is kept once; what was rewound was used all the same.
  ASSERT_OK(catalog().ForkSession("acme@a", 6, "acme@fork"));
  expect(2, 7, 3, 3, 10);
  std::vector<std::string> freed;
  ASSERT_OK(catalog().RewindSession(grant.lease, 4, "", &freed));
  expect(2, 7, 3, 3, 8);
  // So was what is deleted.
  ASSERT_OK(catalog().DeleteSession(grant.lease, &freed));
  expect(2, 7, 3, 2, 8);
  ASSERT_OK_AND_ASSIGN(grant, catalog().AcquireLease("acme@b", "h", "i", absl::Seconds(9)));
  ASSERT_OK(catalog().DeleteSession(grant.lease, &freed));
  expect(2, 7, 3, 1, 6);
  // And what a router counts by itself: totals, of which the largest counts.
  TenantUsage total;
  total.turns = 1, total.prompt_tokens = 40, total.generated_tokens = 10;
  ASSERT_OK(catalog().PutUsage("acme", "router-1", total));
  ASSERT_OK(catalog().PutUsage("acme", "router-2", total));
  ASSERT_OK(catalog().PutUsage("acme.eu", "router-1", total));
  total.turns = 2, total.prompt_tokens = 50;
  ASSERT_OK(catalog().PutUsage("acme", "router-1", total));
  total.turns = 1, total.prompt_tokens = 40;
  ASSERT_OK(catalog().PutUsage("acme", "router-1", total));
  expect(5, 97, 23, 1, 6);
}

TEST_P(CatalogTest, TurnIsAppendedAndRemembered) {
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

TEST_P(CatalogTest, AFailedTurnKeepsItsError) {
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

TEST_P(CatalogTest, ATurnIsFoundByItsRequestIdOrAsTheNewest) {
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

// Of the turns only the open one is known from elsewhere: of another nobody can tell that it was not rewound.
TEST_P(CatalogTest, AnOpenTurnWhoseRowIsGoneIsNotOneThatNeverWas) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(store_.AddTurn(lease, "r1", {1, 2}, {3}));
  ASSERT_OK(catalog().BeginTurn(lease, Turn("r2", {4})));
  ASSERT_OK(AppendOne(catalog(), TestAppend(lease, "r2", 4, {5})));
  const std::string key = TurnKey("s", 2);
  std::string stored;
  const auto edit = [&](const std::function<void(RowTransaction&)>& change) {
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RowTransaction> rows, store_.rows().Begin({}));
    change(*rows);
    ASSERT_OK(rows->Commit());
  };
  edit([&](RowTransaction& rows) {
    stored = rows.Get(key)->value_or("");
    rows.Delete(key);
  });
  ASSERT_FALSE(stored.empty());
  const auto is_lost = StatusIs(StatusCode::kDataLoss, AllOf(HasSubstr("session s"), HasSubstr("open turn")));
  EXPECT_THAT(catalog().FindTurn("s", "r2"), is_lost);
  EXPECT_THAT(catalog().FindTurn("s", ""), is_lost) << "r1 is not the newest";
  EXPECT_THAT(catalog().BeginTurn(lease, Turn("r2", {4})), is_lost);
  EXPECT_THAT(catalog().BeginTurn(lease, Turn("r3", {6})), is_lost);
  ASSERT_OK_AND_ASSIGN(const absl::optional<v1::Turn> other, catalog().FindTurn("s", "r1"));
  EXPECT_TRUE(other.has_value());
  EXPECT_THAT(store_.Tokens("s"), IsOkAndHolds(ElementsAre(1, 2, 3, 4, 5)));
  edit([&](RowTransaction& rows) { rows.Put(key, stored); });
  ASSERT_OK_AND_ASSIGN(const absl::optional<v1::Turn> again, catalog().FindTurn("s", ""));
  ASSERT_TRUE(again.has_value());
  EXPECT_EQ(again->request_id(), "r2");
}

TEST_P(CatalogTest, OpenTurnIsFoundAgainWithWhatItHasSoFar) {
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

TEST_P(CatalogTest, AnotherOpenTurnEndsAsCancelled) {
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

TEST_P(CatalogTest, AppendAtAnotherLengthIsAborted) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  ASSERT_OK(catalog().BeginTurn(lease, Turn("r", Range(0, 3))));
  for (const uint64_t expected_length : {0u, 2u, 4u}) {
    EXPECT_THAT(
        AppendOne(catalog(), TestAppend(lease, "r", expected_length, {9})),
        StatusIs(StatusCode::kAborted, HasSubstr(absl::StrCat("session s has 3 tokens, not ", expected_length))));
  }
  EXPECT_THAT(store_.Tokens("s"), IsOkAndHolds(ElementsAre(0, 1, 2)));
}

TEST_P(CatalogTest, ItemsFailOneByOne) {
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

TEST_P(CatalogTest, OnlyTheLast64TurnsAreKept) {
  ASSERT_OK_AND_ASSIGN(const v1::Lease lease, store_.Create("s"));
  for (uint32_t i = 0; i < 66; ++i) ASSERT_OK(store_.AddTurn(lease, absl::StrCat("r", i), {i}, {}));
  ASSERT_OK_AND_ASSIGN(TurnStart oldest, catalog().BeginTurn(lease, Turn("r2", {})));
  EXPECT_TRUE(oldest.existed);
  ASSERT_OK_AND_ASSIGN(TurnStart forgotten, catalog().BeginTurn(lease, Turn("r1", {})));
  EXPECT_FALSE(forgotten.existed);
}

TEST_P(CatalogTest, SessionBelongsToTheModelOfItsFirstTurn) {
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

TEST_P(CatalogTest, LongInputIsReadBackFromAnyPosition) {
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

INSTANTIATE_TEST_SUITE_P(Engines, CatalogTest, ::testing::Bool(), EngineName);

}  // namespace
}  // namespace rwkv::state_store
