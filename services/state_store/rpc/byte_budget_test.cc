#include "services/state_store/rpc/byte_budget.h"

#include <utility>

#include "absl/status/status.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/grpc_status.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using testing::HasSubstr;
using testing::IsOk;
using testing::StatusIs;

TEST(ByteBudgetTest, WhatIsTakenComesBack) {
  ByteBudget budget(100);
  {
    ASSERT_OK_AND_ASSIGN(ByteBudget::Share share, budget.Take(60, "record x/0"));
    const ByteBudget::Share moved(std::move(share));
    const auto refused = budget.Take(41, "record x/1");
    EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("record x/1: 41 bytes asked, 40")));
    EXPECT_TRUE(common::GetRetryDelay(refused.status()).has_value());
    EXPECT_THAT(budget.Take(40, ""), IsOk());
  }
  EXPECT_THAT(budget.Take(100, ""), IsOk());
}

}  // namespace
}  // namespace rwkv::state_store
