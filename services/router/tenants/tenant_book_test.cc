#include "services/router/tenants/tenant_book.h"

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
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

}  // namespace
}  // namespace rwkv::router
