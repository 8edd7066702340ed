#include "kernels/base/finite.h"

#include <cmath>
#include <limits>
#include <vector>

#include "gtest/gtest.h"

namespace rwkv::kernels {
namespace {

constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

// `values` as `dtype`, at an odd address.
class Elements {
 public:
  Elements(DType dtype, const std::vector<float>& values)
      : dtype_(dtype), count_(static_cast<int64_t>(values.size())), bytes_(1 + values.size() * SizeOf(dtype)) {
    NarrowFromFloat(dtype, values.data(), count_, bytes_.data() + 1);
  }
  int64_t Find() const { return FindNotFinite(dtype_, bytes_.data() + 1, count_); }

 private:
  DType dtype_;
  int64_t count_;
  std::vector<char> bytes_;
};

TEST(FiniteTest, FindsTheFirstWhereverItIs) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float bad_values[] = {infinity, -infinity, std::nanf(""), -std::nanf("")};
  for (const DType dtype : kTypes) {
    for (const int64_t count : {1, 2, 31, 4096, 4097, 10000}) {
      std::vector<float> values(count, -1.5f);
      EXPECT_EQ(Elements(dtype, values).Find(), -1) << Name(dtype) << " " << count;
      for (const int64_t first : {int64_t{0}, count / 2, count - 1}) {
        for (const float bad : bad_values) {
          std::vector<float> with = values;
          with[first] = bad;
          with[count - 1] = bad;
          EXPECT_EQ(Elements(dtype, with).Find(), first) << Name(dtype) << " " << count << " " << bad;
        }
      }
    }
    EXPECT_EQ(FindNotFinite(dtype, nullptr, 0), -1);
  }
}

TEST(FiniteTest, TheLargestAndTheSmallestNumbersAreFinite) {
  const float denormal = std::numeric_limits<float>::denorm_min();
  EXPECT_EQ(Elements(DType::kFloat32, {std::numeric_limits<float>::max(), denormal, -0.0f}).Find(), -1);
  EXPECT_EQ(Elements(DType::kBFloat16, {0x1.fep127f, -0x1.fep127f, 0x1p-133f, -0.0f}).Find(), -1);
  EXPECT_EQ(Elements(DType::kFloat16, {65504.0f, -65504.0f, 0x1p-24f, -0.0f}).Find(), -1);
  EXPECT_EQ(Elements(DType::kFloat16, {65504.0f, 65520.0f}).Find(), 1);  // Rounded to infinity.
}

// A shorter type's exponent is not looked for in a longer one, nor the other way round.
TEST(FiniteTest, EveryPatternOfSixteenBitsIsJudgedAsItsValueIs) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (uint32_t pattern = 0; pattern <= 0xffff; ++pattern) {
      const auto bits = static_cast<uint16_t>(pattern);
      ASSERT_EQ(FindNotFinite(dtype, &bits, 1) < 0, std::isfinite(LoadAsFloat(dtype, &bits, 0))) << pattern;
    }
  }
}

}  // namespace
}  // namespace rwkv::kernels
