#include "services/router/core/yield_choice.h"

#include <string>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace rwkv::router {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

const absl::Time kNow = absl::FromUnixSeconds(1'800'000'000);
constexpr absl::Duration kQuantum = absl::Seconds(5);
constexpr int kMany = 100;

double One(absl::string_view /*tenant*/) { return 1; }

std::vector<uint64_t> Choose(const SlotDemand& demand, int most = kMany) {
  return ChooseYields(demand, most, One, kQuantum, kNow);
}

// Turns 1, 2, ... of a tenant, each with its slot since `ago`.
SlotDemand Holders(const std::string& tenant, int count, absl::Duration ago) {
  SlotDemand demand;
  for (int i = 1; i <= count; ++i) demand.holders.push_back({static_cast<uint64_t>(i), kNow - ago, tenant});
  demand.held[tenant] = count;
  return demand;
}

TEST(YieldChoiceTest, NobodyYieldsWhileNobodyWaits) { EXPECT_THAT(Choose(Holders("a", 2, absl::Hours(1))), IsEmpty()); }

TEST(YieldChoiceTest, TurnsOfOneTenantTakeTurns) {
  SlotDemand demand = Holders("a", 2, absl::Seconds(4));
  demand.line = {"a"};
  EXPECT_THAT(Choose(demand), IsEmpty());
  demand.holders[1].since = kNow - kQuantum;
  EXPECT_THAT(Choose(demand), ElementsAre(2));
}

TEST(YieldChoiceTest, WhoHasLessThanItsShareNeedNotWaitForAQuantum) {
  SlotDemand demand = Holders("flood", 4, absl::ZeroDuration());
  demand.line = {"flood", "quiet"};
  EXPECT_THAT(Choose(demand), ElementsAre(1));
}

TEST(YieldChoiceTest, WhatComesFreeByItselfIsNotTaken) {
  SlotDemand demand = Holders("a", 2, absl::Hours(1));
  demand.line = {"b"};
  EXPECT_THAT(Choose(demand), ElementsAre(1));
  demand.coming = 1;
  EXPECT_THAT(Choose(demand), IsEmpty());
  demand.line = {"b", "c"};
  EXPECT_THAT(Choose(demand), ElementsAre(1));
}

TEST(YieldChoiceTest, NoMoreThanMayBeSaved) {
  SlotDemand demand = Holders("a", 3, absl::Hours(1));
  demand.line = {"a", "a", "a"};
  EXPECT_THAT(Choose(demand), ElementsAre(1, 2, 3));
  EXPECT_THAT(Choose(demand, 2), ElementsAre(1, 2));
  EXPECT_THAT(Choose(demand, 0), IsEmpty());
  EXPECT_THAT(Choose(demand, -1), IsEmpty());
}

}  // namespace
}  // namespace rwkv::router
