#include "kernels/base/dtype.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "gtest/gtest.h"

namespace rwkv::kernels {
namespace {

uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// The value of a half by its definition, in double.
double HalfByDefinition(uint16_t bits) {
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  const int exponent = (bits >> 10) & 0x1f;
  const int mantissa = bits & 0x3ff;
  if (exponent == 0x1f) return mantissa == 0 ? sign * HUGE_VAL : NAN;
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

TEST(DTypeTest, HalfWidensByItsDefinition) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const double expected = HalfByDefinition(static_cast<uint16_t>(bits));
    const float actual = HalfToFloat(static_cast<uint16_t>(bits));
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(actual)) << bits;
    } else {
      EXPECT_EQ(static_cast<double>(actual), expected) << bits;
      EXPECT_EQ(std::signbit(actual), (bits & 0x8000) != 0) << bits;
    }
  }
}

TEST(DTypeTest, EverySixteenBitValueSurvivesWideningAndNarrowing) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const auto narrow = static_cast<uint16_t>(bits);
    if (std::isnan(HalfToFloat(narrow))) {
      EXPECT_TRUE(std::isnan(HalfToFloat(FloatToHalf(HalfToFloat(narrow))))) << bits;
    } else {
      EXPECT_EQ(FloatToHalf(HalfToFloat(narrow)), narrow);
    }
    if (std::isnan(BFloat16ToFloat(narrow))) {
      EXPECT_TRUE(std::isnan(BFloat16ToFloat(FloatToBFloat16(BFloat16ToFloat(narrow))))) << bits;
    } else {
      EXPECT_EQ(FloatToBFloat16(BFloat16ToFloat(narrow)), narrow);
    }
  }
}

// Between every two neighbours: just below the middle goes down, just above up, the middle itself to the even one.
template <typename Widen, typename Narrow>
void ExpectNearestEven(uint16_t below, Widen widen, Narrow narrow) {
  const auto above = static_cast<uint16_t>(below + 1);
  const float middle = static_cast<float>((static_cast<double>(widen(below)) + static_cast<double>(widen(above))) / 2);
  const uint16_t even = below % 2 == 0 ? below : above;
  EXPECT_EQ(narrow(middle), even) << below;
  EXPECT_EQ(narrow(std::nextafter(middle, 0.0f)), below) << below;
  EXPECT_EQ(narrow(std::nextafter(middle, std::numeric_limits<float>::infinity())), above) << below;
  EXPECT_EQ(narrow(-middle), even | 0x8000) << below;
}

TEST(DTypeTest, NarrowingRoundsToNearestEven) {
  for (uint16_t below = 0; below < 0x7bff; ++below) ExpectNearestEven(below, HalfToFloat, FloatToHalf);
  for (uint16_t below = 0x80; below < 0x7f7f; ++below) ExpectNearestEven(below, BFloat16ToFloat, FloatToBFloat16);
}

TEST(DTypeTest, TooLargeBecomesInfinity) {
  EXPECT_EQ(FloatToHalf(65519.996f), 0x7bff);
  EXPECT_EQ(FloatToHalf(65520.0f), 0x7c00);
  EXPECT_EQ(FloatToHalf(-1e30f), 0xfc00);
  EXPECT_EQ(FloatToHalf(std::numeric_limits<float>::infinity()), 0x7c00);
  EXPECT_EQ(FloatToBFloat16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_EQ(FloatToBFloat16(-std::numeric_limits<float>::infinity()), 0xff80);
}

TEST(DTypeTest, NotANumberNeverBecomesInfinity) {
  float value;
  for (uint32_t bits : {0x7f800001u, 0x7fc00000u, 0xff800001u, 0x7fffffffu}) {
    std::memcpy(&value, &bits, sizeof(value));
    EXPECT_TRUE(std::isnan(BFloat16ToFloat(FloatToBFloat16(value)))) << bits;
    EXPECT_TRUE(std::isnan(HalfToFloat(FloatToHalf(value)))) << bits;
  }
}

TEST(DTypeTest, ArraysMayBeUnaligned) {
  const std::vector<float> values = {1.0f, -2.5f, 0.0f, 65504.0f, 0x1p-14f};
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    std::vector<char> bytes(1 + values.size() * static_cast<size_t>(SizeOf(dtype)));
    NarrowFromFloat(dtype, values.data(), static_cast<int64_t>(values.size()), bytes.data() + 1);
    std::vector<float> back(values.size());
    WidenToFloat(dtype, bytes.data() + 1, static_cast<int64_t>(values.size()), back.data());
    for (size_t i = 0; i < values.size(); ++i) {
      EXPECT_EQ(back[i], LoadAsFloat(dtype, bytes.data() + 1, static_cast<int64_t>(i)));
      if (dtype != DType::kBFloat16 || values[i] != 65504.0f) EXPECT_EQ(BitsOf(back[i]), BitsOf(values[i]));
    }
  }
}

}  // namespace
}  // namespace rwkv::kernels
