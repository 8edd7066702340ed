#include "services/router/scheduler/fair_slots.h"

#include <map>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace rwkv::router {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::Pair;
using ::testing::SizeIs;
using ::testing::UnorderedElementsAre;

const absl::Time kNow = absl::FromUnixSeconds(1'800'000'000);
constexpr absl::Duration kQuantum = absl::Seconds(5);

double One(absl::string_view tenant) { return 1; }
double Heavy(absl::string_view tenant) { return tenant == "heavy" ? 3 : 1; }

FairHolder Holder(uint64_t id, const std::string& tenant, absl::Duration ago) { return {id, kNow - ago, tenant}; }

TEST(FairSlotsTest, AllocationIsByWeightAndNobodyGetsMoreThanHeWants) {
  EXPECT_THAT(FairAllocation(8, {{"a", 100}, {"b", 100}}, One), UnorderedElementsAre(Pair("a", 4), Pair("b", 4)));
  EXPECT_THAT(FairAllocation(8, {{"heavy", 100}, {"b", 100}}, Heavy),
              UnorderedElementsAre(Pair("heavy", 6), Pair("b", 2)));
  EXPECT_THAT(FairAllocation(8, {{"a", 1}, {"b", 100}}, One), UnorderedElementsAre(Pair("a", 1), Pair("b", 7)));
  EXPECT_THAT(FairAllocation(8, {{"a", 1}, {"b", 2}}, One), UnorderedElementsAre(Pair("a", 1), Pair("b", 2)));
  EXPECT_THAT(FairAllocation(0, {{"a", 1}}, One), IsEmpty());
}

TEST(FairSlotsTest, OneTenantTakesTurnsAsBefore) {
  const std::vector<FairHolder> holders = {Holder(1, "", absl::Seconds(9)), Holder(2, "", absl::Seconds(6)),
                                           Holder(3, "", absl::Seconds(1))};
  EXPECT_THAT(ChooseFairYields(holders, {{"", 3}}, {""}, One, kQuantum, kNow), ElementsAre(1));
  EXPECT_THAT(ChooseFairYields(holders, {{"", 3}}, {"", "", ""}, One, kQuantum, kNow), ElementsAre(1, 2));
}

TEST(FairSlotsTest, WhoHasFewerThanItsShareTakesAtOnceFromWhoHasMore) {
  std::vector<FairHolder> holders;
  for (int i = 1; i <= 4; ++i) holders.push_back(Holder(i, "flood", absl::Milliseconds(100 - i)));
  EXPECT_THAT(ChooseFairYields(holders, {{"flood", 4}}, {"quiet"}, One, kQuantum, kNow), ElementsAre(1));
  // Two for each, and no more.
  EXPECT_THAT(ChooseFairYields(holders, {{"flood", 4}}, {"quiet", "quiet", "quiet"}, One, kQuantum, kNow),
              ElementsAre(1, 2));
  EXPECT_THAT(ChooseFairYields(holders, {{"flood", 4}}, {"heavy", "heavy", "heavy", "heavy"}, Heavy, kQuantum, kNow),
              SizeIs(3));
}

TEST(FairSlotsTest, WhoIsWithinItsShareLosesNothingToAFlood) {
  const std::vector<FairHolder> holders = {Holder(1, "quiet", absl::Hours(1)), Holder(2, "quiet", absl::Hours(1)),
                                           Holder(3, "flood", absl::Seconds(1)), Holder(4, "flood", absl::Seconds(6))};
  const std::vector<std::string> waiting(1000, "flood");
  EXPECT_THAT(ChooseFairYields(holders, {{"quiet", 2}, {"flood", 2}}, waiting, One, kQuantum, kNow), ElementsAre(4));
}

TEST(FairSlotsTest, WithFewerSlotsThanTenantsTheyTakeTurns) {
  const std::vector<FairHolder> holders = {Holder(1, "a", absl::Seconds(6)), Holder(2, "b", absl::Seconds(4))};
  EXPECT_THAT(ChooseFairYields(holders, {{"a", 1}, {"b", 1}}, {"c"}, One, kQuantum, kNow), ElementsAre(1));
  EXPECT_THAT(ChooseFairYields(holders, {{"a", 1}, {"b", 1}}, {"c", "d"}, One, kQuantum, kNow), ElementsAre(1));
  EXPECT_THAT(ChooseFairYields(holders, {{"a", 1}, {"b", 1}}, {"c"}, One, absl::Hours(1), kNow), IsEmpty());
}

TEST(FairSlotsTest, SlotsThatCannotBeGivenAwayCountAll) {
  // The flood has three of four slots, but only one that could go now.
  const std::vector<FairHolder> holders = {Holder(7, "flood", absl::ZeroDuration())};
  EXPECT_THAT(ChooseFairYields(holders, {{"flood", 3}, {"quiet", 1}}, {"quiet", "quiet"}, One, kQuantum, kNow),
              ElementsAre(7));
  EXPECT_THAT(ChooseFairYields({}, {{"flood", 4}}, {"quiet"}, One, kQuantum, kNow), IsEmpty());
}

TEST(FairSlotsTest, FreeSlotsGoToWhoHasFewestForItsWeight) {
  EXPECT_THAT(FairOrder({{"flood", 2}}, {"flood", "flood", "quiet", "quiet", "quiet"}, One),
              ElementsAre(2, 3, 0, 4, 1));
  EXPECT_THAT(FairOrder({}, {"", "", ""}, One), ElementsAre(0, 1, 2));
  EXPECT_THAT(FairOrder({}, {"b", "heavy", "heavy", "heavy", "b"}, Heavy), ElementsAre(1, 2, 0, 3, 4));
}

TEST(FairSlotsTest, ASingleSlotIsTheHeaviestTenants) {
  EXPECT_THAT(FairAllocation(1, {{"a", 1}, {"heavy", 1}}, Heavy), Contains(Pair("heavy", 1)));
}

TEST(FairSlotsTest, WhoHasItsShareGivesNothingThoughOthersCannot) {
  // "b" has two, and can give neither away now.
  EXPECT_THAT(ChooseFairYields({Holder(1, "a", absl::Seconds(1))}, {{"a", 1}, {"b", 2}}, {"c"}, One, kQuantum, kNow),
              IsEmpty());
}

TEST(FairSlotsTest, WithFewerSlotsThanTenantsWhoHadItLongestGives) {
  const std::vector<FairHolder> holders = {Holder(1, "a", absl::Seconds(6)), Holder(2, "b", absl::Seconds(9))};
  EXPECT_THAT(ChooseFairYields(holders, {{"a", 1}, {"b", 1}}, {"c"}, One, kQuantum, kNow), ElementsAre(2));
}

}  // namespace
}  // namespace rwkv::router
