#include "services/router/scheduler/kept_slots.h"

#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace rwkv::router {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::Pair;

TEST(KeptSlotsTest, AreForOneTenantOfOnePoolUntilUsedOrLate) {
  const absl::Time now = absl::UnixEpoch();
  KeptSlots kept;
  EXPECT_TRUE(kept.empty());
  kept.Keep("pool", "quiet", now + absl::Milliseconds(50));
  kept.Keep("pool", "quiet", now + absl::Milliseconds(60));
  kept.Keep("other", "acme", now + absl::Milliseconds(60));
  EXPECT_THAT(kept.ForOthersThan("flood"), ElementsAre(Pair("other", 1), Pair("pool", 2)));
  EXPECT_THAT(kept.ForOthersThan("quiet"), ElementsAre(Pair("other", 1)));
  kept.Use("pool", "flood");
  kept.Use("other", "quiet");
  EXPECT_THAT(kept.ForOthersThan("flood"), ElementsAre(Pair("other", 1), Pair("pool", 2))) << "these are not theirs";
  kept.Use("pool", "quiet");
  EXPECT_THAT(kept.ForOthersThan("flood"), ElementsAre(Pair("other", 1), Pair("pool", 1)));
  kept.Expire(now + absl::Milliseconds(59));
  EXPECT_FALSE(kept.empty());
  kept.Expire(now + absl::Milliseconds(60));
  EXPECT_THAT(kept.ForOthersThan("flood"), IsEmpty());
  EXPECT_TRUE(kept.empty());
}

}  // namespace
}  // namespace rwkv::router
