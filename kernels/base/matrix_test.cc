#include "kernels/base/matrix.h"

#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "tests/testing/status_matchers.h"

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

TEST(MatrixTest, RowsOfAMatrixAreItsWeights) {
  std::vector<uint8_t> data(2000);
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<uint8_t>(37 * i);
  std::vector<uint16_t> halves(64);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(0x3400 + 9 * i);
  MatrixView plain = {DType::kBFloat16, 6, 40, data.data()};
  MatrixView int8 = {DType::kFloat16, 6, 40, data.data()};
  int8.quantization = Quantization::kInt8;
  int8.group = 32;
  int8.scales = halves.data();
  MatrixView int4 = int8;
  int4.quantization = Quantization::kInt4;
  int4.minimums = halves.data() + 30;
  MatrixView blocks = {DType::kFloat32, 6, 64, data.data()};
  blocks.quantization = Quantization::kBlocks;
  blocks.blocks = BlockType::kQ4_0;
  for (const MatrixView& whole : {plain, int8, int4, blocks}) {
    const MatrixView part = RowsOf(whole, 2, 3);
    EXPECT_EQ(part.rows, 3);
    for (int64_t row = 0; row < 3; ++row) {
      for (int64_t col = 0; col < whole.cols; ++col) {
        const float expected = LoadAsFloat(whole, row + 2, col);
        const float actual = LoadAsFloat(part, row, col);
        EXPECT_EQ(std::memcmp(&expected, &actual, sizeof(float)), 0)
            << Name(whole.quantization) << " " << row << " " << col;
      }
    }
  }
}

// One row changes one thing of a good matrix: [10, 8] of floats, or [10, 40] of codes in groups of 32.
TEST(MatrixTest, WhatIsNoMatrixIsAnErrorThatNamesTheThing) {
  const std::vector<float> floats(400);
  const std::vector<uint16_t> halves(64);
  const auto odd = [](const void* data, int64_t bytes) { return static_cast<const char*>(data) + bytes; };
  const MatrixView plain = {DType::kFloat32, 10, 8, floats.data()};
  MatrixView int8 = {DType::kFloat16, 10, 40, floats.data()};
  int8.quantization = Quantization::kInt8;
  int8.group = 32;
  int8.scales = halves.data();
  MatrixView int4 = int8;
  int4.quantization = Quantization::kInt4;
  int4.minimums = halves.data() + 20;
  MatrixView blocks = {DType::kFloat32, 10, 64, floats.data()};
  blocks.quantization = Quantization::kBlocks;
  blocks.blocks = BlockType::kQ8_0;
  for (const MatrixView& matrix : {plain, int8, int4, blocks}) EXPECT_OK(CheckMatrix("w", matrix));

  struct Case {
    MatrixView matrix;
    std::function<void(MatrixView&)> change;
    std::string message;
  };
  const std::vector<Case> cases = {
      {plain, [](auto& m) { m.cols = 0; }, "w is [10, 0], its sizes are not in [1, 2^31)"},
      {plain, [](auto& m) { m.rows = -1; }, "w is [-1, 8]"},
      {plain, [](auto& m) { m.rows = int64_t{1} << 31; }, "w is [2147483648, 8]"},
      {plain, [](auto& m) { m.dtype = static_cast<DType>(77); }, "w has unknown dtype 77"},
      {plain, [](auto& m) { m.data = nullptr; }, "w is null"},
      {plain, [&](auto& m) { m.data = odd(m.data, 2); }, "w is not aligned to its element of 4 bytes"},
      {int8, [](auto& m) { m.quantization = static_cast<Quantization>(5); }, "w has unknown quantization 5"},
      {int8, [](auto& m) { m.scales = nullptr; }, "w is int8 and has no scales"},
      {int8, [](auto& m) { m.dtype = DType::kFloat32; }, "w has scales of fp32, expected fp16"},
      {int8, [](auto& m) { m.data = nullptr; }, "w is null"},
      {int8, [&](auto& m) { m.scales = reinterpret_cast<const uint16_t*>(odd(m.scales, 1)); },
       "not aligned to 2 bytes"},
      {int4, [](auto& m) { m.minimums = nullptr; }, "w is int4 and has no minimums"},
      {int4, [](auto& m) { m.group = 48; }, "w has groups of 48 weights, expected 32 or 64"},
      {blocks, [](auto& m) { m.cols = 40; }, "w has rows of 40 weights, which Q8_0 blocks do not fill"},
  };
  for (const Case& c : cases) {
    MatrixView matrix = c.matrix;
    c.change(matrix);
    EXPECT_THAT(CheckMatrix("w", matrix),
                ::rwkv::testing::StatusIs(absl::StatusCode::kInvalidArgument, ::testing::HasSubstr(c.message)));
  }
}

}  // namespace
}  // namespace rwkv::kernels
