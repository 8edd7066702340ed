#include "kernels/base/matrix.h"

#include <vector>

#include "gtest/gtest.h"
#include "kernels/base/dtype.h"

namespace rwkv::kernels {
namespace {

// Halves: 0.5, 2, -1, 0.25, and the smallest subnormal.
constexpr uint16_t kScales[] = {0x3800, 0x4000, 0xbc00, 0x3400};
constexpr uint16_t kMinimums[] = {0x3800, 0x0001, 0x4000, 0xbc00};

// [2, 33] in groups of 32: the last group of a row is one weight.
MatrixView TwoRows(Quantization quantization, const void* data) {
  MatrixView matrix = {DType::kFloat16, 2, 33, data};
  matrix.quantization = quantization;
  matrix.group = 32;
  matrix.scales = kScales;
  return matrix;
}

TEST(MatrixTest, Int8WeightIsCodeTimesScale) {
  std::vector<int8_t> codes(66);
  codes[0] = -128;
  codes[31] = 127;
  codes[32] = 3;
  codes[33] = 5;
  codes[65] = -7;
  MatrixView matrix = TwoRows(Quantization::kInt8, codes.data());
  EXPECT_EQ(LoadAsFloat(matrix, 0, 0), -64.0f);
  EXPECT_EQ(LoadAsFloat(matrix, 0, 31), 63.5f);
  EXPECT_EQ(LoadAsFloat(matrix, 0, 32), 6.0f);
  EXPECT_EQ(LoadAsFloat(matrix, 1, 0), -5.0f);
  EXPECT_EQ(LoadAsFloat(matrix, 1, 32), -1.75f);
  EXPECT_EQ(SizeInBytes(matrix), 66 + 4 * 2);
  matrix.minimums = kMinimums;
  EXPECT_EQ(LoadAsFloat(matrix, 0, 31), 64.0f);
  EXPECT_EQ(LoadAsFloat(matrix, 0, 32), 6.0f);  // 6 + 2^-24 is rounded.
  EXPECT_EQ(LoadAsFloat(matrix, 1, 32), -2.75f);
  EXPECT_EQ(SizeInBytes(matrix), 66 + 8 * 2);
}

TEST(MatrixTest, Int4WeightsAreTwoAByteTheEvenColumnLow) {
  std::vector<uint8_t> codes(2 * 17);
  codes[0] = 0xf2;   // columns 0 and 1 of row 0
  codes[16] = 0xa3;  // column 32; the high half belongs to nobody
  codes[17] = 0x10;
  codes[33] = 0x07;
  MatrixView matrix = TwoRows(Quantization::kInt4, codes.data());
  matrix.minimums = kMinimums;
  EXPECT_EQ(LoadAsFloat(matrix, 0, 0), 1.5f);
  EXPECT_EQ(LoadAsFloat(matrix, 0, 1), 8.0f);
  EXPECT_EQ(LoadAsFloat(matrix, 0, 32), 6.0f);
  EXPECT_EQ(LoadAsFloat(matrix, 1, 0), 2.0f);
  EXPECT_EQ(LoadAsFloat(matrix, 1, 1), 1.0f);
  EXPECT_EQ(LoadAsFloat(matrix, 1, 32), 0.75f);
  EXPECT_EQ(RowBytes(matrix), 17);
  EXPECT_EQ(SizeInBytes(matrix), 34 + 8 * 2);
}

TEST(MatrixTest, FloatsAreLoadedAsTheyAre) {
  const std::vector<uint16_t> data = {0x3f80, 0x4000, 0xbf80, 0x0001};
  const MatrixView matrix = {DType::kBFloat16, 2, 2, data.data()};
  EXPECT_EQ(LoadAsFloat(matrix, 0, 1), 2.0f);
  EXPECT_EQ(LoadAsFloat(matrix, 1, 0), -1.0f);
  EXPECT_EQ(LoadAsFloat(matrix, 1, 1), BFloat16ToFloat(1));
  EXPECT_EQ(GroupsPerRow(matrix), 0);
  EXPECT_EQ(SizeInBytes(matrix), 8);
}

}  // namespace
}  // namespace rwkv::kernels
