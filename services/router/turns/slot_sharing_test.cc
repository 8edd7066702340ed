#include "services/router/turns/slot_sharing.h"

#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace rwkv::router {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr absl::Duration kQuantum = absl::Seconds(5);

absl::Time At(int seconds) { return absl::FromUnixSeconds(1000 + seconds); }

TEST(SlotSharingTest, WhoHasHadItLongestGivesItAwayFirst) {
  const std::vector<SlotHolder> holders = {{7, At(3)}, {8, At(1)}, {9, At(2)}};
  EXPECT_THAT(ChooseYields(holders, 1, kQuantum, At(100)), ElementsAre(8));
  EXPECT_THAT(ChooseYields(holders, 2, kQuantum, At(100)), ElementsAre(8, 9));
  EXPECT_THAT(ChooseYields(holders, 5, kQuantum, At(100)), ElementsAre(8, 9, 7));
  EXPECT_THAT(ChooseYields(holders, 0, kQuantum, At(100)), IsEmpty());
  EXPECT_THAT(ChooseYields(holders, -1, kQuantum, At(100)), IsEmpty());
}

TEST(SlotSharingTest, NobodyGivesAwayWhatIsNotUsedUp) {
  const std::vector<SlotHolder> holders = {{7, At(0)}, {8, At(1)}};
  EXPECT_THAT(ChooseYields(holders, 2, kQuantum, At(4)), IsEmpty());
  EXPECT_THAT(ChooseYields(holders, 2, kQuantum, At(5)), ElementsAre(7));
  EXPECT_THAT(ChooseYields(holders, 2, kQuantum, At(6)), ElementsAre(7, 8));
}

TEST(SlotSharingTest, EqualTenuresGoByAge) {
  EXPECT_THAT(ChooseYields({{9, At(0)}, {3, At(0)}}, 1, kQuantum, At(60)), ElementsAre(3));
}

}  // namespace
}  // namespace rwkv::router
