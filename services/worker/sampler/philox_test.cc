#include "services/worker/sampler/philox.h"

#include <cstdint>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace rwkv::worker {
namespace {

using ::testing::ElementsAre;

// Random123 1.14, tests/kat_vectors, "philox4x32 10".
TEST(PhiloxTest, EqualsThePublishedVectors) {
  EXPECT_THAT(Philox4x32({0, 0, 0, 0}, {0, 0}), ElementsAre(0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8));
  constexpr uint32_t kOnes = 0xffffffff;
  EXPECT_THAT(Philox4x32({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}),
              ElementsAre(0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd));
  EXPECT_THAT(Philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
              ElementsAre(0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1));
}

TEST(PhiloxTest, BitsUseTheWholeSeedAndPosition) {
  EXPECT_EQ(PhiloxBits(0, 0), 0x6627e8d5e169c58dull);
  const uint64_t base = PhiloxBits(1, 1);
  EXPECT_NE(base, PhiloxBits(1 + (uint64_t{1} << 32), 1));
  EXPECT_NE(base, PhiloxBits(1, 1 + (uint64_t{1} << 32)));
  EXPECT_NE(base, PhiloxBits(2, 1));
  EXPECT_NE(base, PhiloxBits(1, 2));
}

}  // namespace
}  // namespace rwkv::worker
