#include "services/router/tenants/tenant_book.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/grpc_status.h"
#include "services/common/metrics.h"
#include "services/router/tenants/tenants_file.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;

class TenantBookTest : public ::testing::Test {
 protected:
  void Set(const std::string& file) {
    const absl::StatusOr<std::vector<TenantLimits>> tenants = ParseTenants(file);
    ASSERT_THAT(tenants, IsOk());
    book_.SetTenants(*tenants);
  }
  absl::Status Refusal(const std::string& tenant, double tokens) { return book_.Admit(tenant, tokens).status(); }

  testing::FakeClock clock_;
  const std::unique_ptr<common::Metrics> metrics_ = *common::Metrics::Create("");
  TenantBook book_{&clock_, metrics_.get()};
};

TEST_F(TenantBookTest, ARefusalNamesTheLimitAndWhenToComeAgain) {
  Set("name=acme requests_per_minute=2 tokens_per_minute=600 concurrent_turns=1\nname=free\n");
  {
    ASSERT_OK_AND_ASSIGN(const auto ticket, book_.Admit("acme", 100));
    const absl::Status busy = Refusal("acme", 1);
    EXPECT_THAT(busy, StatusIs(absl::StatusCode::kResourceExhausted,
                               AllOf(HasSubstr("tenant acme"), HasSubstr("concurrent_turns, 1"))));
    EXPECT_TRUE(common::GetRetryDelay(busy).has_value());
    ticket->Fed(100);
  }
  const absl::Status large = Refusal("acme", 600);
  EXPECT_THAT(large, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("tokens_per_minute, 600")));
  EXPECT_EQ(common::GetRetryDelay(large), absl::Seconds(10));
  ASSERT_THAT(book_.Admit("acme", 10), IsOk());
  const absl::Status often = Refusal("acme", 10);
  EXPECT_THAT(often, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("requests_per_minute, 2")));
  EXPECT_EQ(common::GetRetryDelay(often), absl::Seconds(30));
  // Nobody else is refused for it.
  for (int i = 0; i < 100; ++i) EXPECT_THAT(book_.Admit("free", 1e6), IsOk());
  clock_.Advance(absl::Seconds(30));
  EXPECT_THAT(book_.Admit("acme", 10), IsOk());
}

TEST_F(TenantBookTest, WhoIsNotInTheFileIsDenied) {
  Set("name=acme\n");
  EXPECT_THAT(Refusal("other", 1), StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("\"other\"")));
  EXPECT_THAT(Refusal("", 1), StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("no tenant")));
  EXPECT_THAT(book_.Limits("other"), StatusIs(absl::StatusCode::kPermissionDenied));
  EXPECT_THAT(book_.Limits("acme"), IsOk());
}

TEST_F(TenantBookTest, AnswersRunIntoDebtThatIsFilledFirst) {
  Set("name=acme tokens_per_minute=600\n");
  ASSERT_OK_AND_ASSIGN(const auto ticket, book_.Admit("acme", 100));
  ticket->Fed(100);
  ticket->Drawn(600);
  EXPECT_EQ(common::GetRetryDelay(Refusal("acme", 1)), absl::Milliseconds(10100));
  clock_.Advance(absl::Milliseconds(10100));
  EXPECT_THAT(book_.Admit("acme", 1), IsOk());
}

TEST_F(TenantBookTest, WhatWasNotFedIsGivenBack) {
  Set("name=acme tokens_per_minute=600 requests_per_minute=1\n");
  {
    ASSERT_OK_AND_ASSIGN(const auto ticket, book_.Admit("acme", 600));
    ticket->Refund();
  }
  ASSERT_OK_AND_ASSIGN(const auto ticket, book_.Admit("acme", 600));
  ticket->Fed(100);  // It was thought longer than it is.
  ticket->Refund();  // Too late: something came of it.
  Set("name=acme tokens_per_minute=600\n");
  EXPECT_THAT(book_.Admit("acme", 500), IsOk());
  EXPECT_THAT(Refusal("acme", 1), StatusIs(absl::StatusCode::kResourceExhausted));
}

TEST_F(TenantBookTest, LimitsChangeUnderRunningCalls) {
  Set("name=acme concurrent_turns=2\n");
  ASSERT_OK_AND_ASSIGN(auto first, book_.Admit("acme", 1));
  ASSERT_OK_AND_ASSIGN(const auto second, book_.Admit("acme", 1));
  Set("name=acme concurrent_turns=1\n");
  first = nullptr;
  EXPECT_THAT(Refusal("acme", 1), StatusIs(absl::StatusCode::kResourceExhausted));
  Set("name=free\n");
  second->Drawn(5);  // It goes on.
  EXPECT_THAT(Refusal("acme", 1), StatusIs(absl::StatusCode::kPermissionDenied));
}

TEST_F(TenantBookTest, TotalsAddUp) {
  Set("name=acme\n");
  UsageTotals totals;
  for (int i = 1; i <= 3; ++i) {
    ASSERT_OK_AND_ASSIGN(const auto ticket, book_.Admit("acme", 7));
    ticket->Fed(10);
    for (int token = 0; token < i; ++token) ticket->Drawn(1);
    totals = ticket->Count();
  }
  EXPECT_EQ(totals.turns, 3u);
  EXPECT_EQ(totals.prompt_tokens, 30u);
  EXPECT_EQ(totals.generated_tokens, 6u);
}

// Several routers of one cluster, which hear of each other.
class TenantBooksTest : public ::testing::Test {
 protected:
  void Start(int routers, const std::string& file) {
    for (int i = 0; i < routers; ++i) Add(file);
  }
  void Add(const std::string& file) {
    metrics_.push_back(*common::Metrics::Create(""));
    books_.push_back(std::make_unique<TenantBook>(&clock_, metrics_.back().get()));
    incarnations_.push_back(absl::StrCat("start-", ++starts_));
    ASSERT_OK_AND_ASSIGN(const std::vector<TenantLimits> tenants, ParseTenants(file));
    books_.back()->SetTenants(tenants);
  }
  v1::RouterAnnouncement Said(size_t router) {
    v1::RouterAnnouncement said;
    said.set_incarnation(incarnations_[router]);
    books_[router]->Tell(&said);
    return said;
  }
  void Hear() {
    clock_.Advance(absl::Milliseconds(100));
    std::vector<v1::RouterAnnouncement> said;
    for (size_t i = 0; i < books_.size(); ++i) said.push_back(Said(i));
    for (size_t i = 0; i < books_.size(); ++i) {
      std::vector<v1::RouterAnnouncement> others = said;
      others.erase(others.begin() + static_cast<int>(i));
      books_[i]->Heard(others);
    }
  }
  // Time passes, and routers hear of each other.
  void Pass(absl::Duration time) {
    for (const absl::Time end = clock_.Now() + time; clock_.Now() < end;) Hear();
  }
  // How many calls of `tokens` are let in, of as many as are needed to be refused.
  int Admitted(size_t router, double tokens) {
    int calls = 0;
    while (true) {
      const auto ticket = books_[router]->Admit("acme", tokens);
      if (!ticket.ok()) return calls;
      (*ticket)->Fed(static_cast<uint64_t>(tokens));
      ++calls;
    }
  }

  testing::FakeClock clock_;
  int starts_ = 0;
  std::vector<std::unique_ptr<common::Metrics>> metrics_;
  std::vector<std::unique_ptr<TenantBook>> books_;
  std::vector<std::string> incarnations_;
};

TEST_F(TenantBooksTest, OneRouterGivesTheWholeLimitAndTheOthersNothingMore) {
  Start(3, "name=acme tokens_per_minute=600\n");
  EXPECT_EQ(Admitted(1, 10), 60);
  Hear();
  for (size_t router = 0; router < 3; ++router) EXPECT_EQ(Admitted(router, 10), 0) << router;
  Pass(absl::Seconds(10));  // It fills everywhere, and is taken everywhere.
  EXPECT_EQ(Admitted(0, 10), 10);
  Hear();
  EXPECT_EQ(Admitted(2, 10), 0);
}

TEST_F(TenantBooksTest, WhatWasTakenBeforeOthersHeardOfItIsADebt) {
  Start(2, "name=acme requests_per_minute=60\n");
  EXPECT_EQ(Admitted(0, 1), 60);
  EXPECT_EQ(Admitted(1, 1), 60);
  Hear();
  // A minute's worth too much: so nothing for a minute.
  clock_.Advance(absl::Seconds(55));
  EXPECT_EQ(Admitted(0, 1), 0);
  clock_.Advance(absl::Seconds(10));
  EXPECT_EQ(Admitted(0, 1), 5);
}

TEST_F(TenantBooksTest, OverMinutesTheLimitHoldsWhateverRoutersAreUsed) {
  Start(3, "name=acme requests_per_minute=60\n");
  int calls = 0;
  for (int i = 0; i < 10 * 60; ++i) {  // Ten minutes, routers hear of each other every second.
    for (int call = 0; call < 10; ++call) calls += books_[(i + call) % 3]->Admit("acme", 1).ok();
    clock_.Advance(absl::Milliseconds(900));
    Hear();
  }
  // Ten minutes' worth and a full bucket, and some that came between hearings.
  EXPECT_GE(calls, 10 * 60);
  EXPECT_LE(calls, 11 * 60 + 3 * 10);
}

TEST_F(TenantBooksTest, RunningCallsCountEverywhereUntilTheyEndOrTheirRouter) {
  Start(2, "name=acme concurrent_turns=3\n");
  ASSERT_OK_AND_ASSIGN(auto one, books_[0]->Admit("acme", 1));
  ASSERT_OK_AND_ASSIGN(auto two, books_[0]->Admit("acme", 1));
  Hear();
  ASSERT_OK_AND_ASSIGN(const auto three, books_[1]->Admit("acme", 1));
  EXPECT_THAT(books_[1]->Admit("acme", 1).status(),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("concurrent_turns, 3")));
  one = nullptr;
  Hear();
  EXPECT_THAT(books_[1]->Admit("acme", 1), IsOk());
  two = nullptr;
  Hear();
  EXPECT_EQ(Said(0).tenants_size(), 0) << "nothing is missing any more";
  ASSERT_OK_AND_ASSIGN(const auto four, books_[1]->Admit("acme", 1));
  books_[1]->Heard({});  // The other one is gone.
  EXPECT_THAT(books_[1]->Admit("acme", 1), IsOk());
}

TEST_F(TenantBooksTest, ARouterThatStartsGivesNobodyAFullMinuteMore) {
  Start(1, "name=acme tokens_per_minute=600\n");
  for (int minute = 0; minute < 5; ++minute) {
    EXPECT_EQ(Admitted(0, 10), 60);
    clock_.Advance(absl::Minutes(1));
  }
  EXPECT_EQ(Admitted(0, 10), 60);
  Add("name=acme tokens_per_minute=600\n");
  Hear();
  EXPECT_EQ(Admitted(1, 10), 0);
  clock_.Advance(absl::Seconds(60));  // And keeps nothing from it beyond that.
  EXPECT_EQ(Admitted(1, 10), 60);
}

TEST_F(TenantBooksTest, OneThatIsNotCalledForAWhileOwesNothingForIt) {
  Start(2, "name=acme tokens_per_minute=600\n");
  for (int i = 0; i < 10; ++i) {  // Ten minutes' worth in ten minutes.
    (void)Admitted(0, 10);
    Pass(absl::Seconds(61));  // And a second for news.
  }
  EXPECT_EQ(Admitted(1, 10), 60);
  // Cut off from each other meanwhile: then it is careful for a minute, not for ten.
  for (int i = 0; i < 10; ++i) {
    clock_.Advance(absl::Minutes(1));
    (void)Admitted(0, 10);
  }
  Hear();
  EXPECT_EQ(Admitted(1, 10), 0);
  Pass(absl::Seconds(61));
  EXPECT_EQ(Admitted(1, 10), 60);
}

TEST_F(TenantBooksTest, WhatIsGivenBackIsGivenBackEverywhere) {
  Start(2, "name=acme tokens_per_minute=600\n");
  {
    ASSERT_OK_AND_ASSIGN(const auto ticket, books_[0]->Admit("acme", 600));
    Hear();
    EXPECT_EQ(Admitted(1, 10), 0);
    ticket->Refund();
    Hear();
  }
  EXPECT_EQ(Admitted(1, 10), 60);
}

TEST_F(TenantBooksTest, WhatIsToldHasABound) {
  std::string file;
  for (int i = 0; i < 2 * TenantBook::kMaxTold; ++i) absl::StrAppend(&file, "name=t", i, " concurrent_turns=9\n");
  Start(1, file);
  std::vector<std::shared_ptr<TenantBook::Ticket>> tickets;
  for (int i = 0; i < 2 * TenantBook::kMaxTold; ++i) {
    ASSERT_OK_AND_ASSIGN(auto ticket, books_[0]->Admit(absl::StrCat("t", i), 1));
    tickets.push_back(std::move(ticket));
  }
  clock_.Advance(absl::Seconds(1));
  EXPECT_EQ(Said(0).tenants_size(), TenantBook::kMaxTold);
}

}  // namespace
}  // namespace rwkv::router
