#include "kernels/base/fixed_point.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace rwkv::kernels {
namespace {

using ::testing::Each;

TEST(FixedPointTest, ANumberIsWithinHalfAScaleOfWhatItStandsFor) {
  std::mt19937 generator(5);
  std::normal_distribution<float> normal;
  for (const float size : {1e-25f, 1e-3f, 1.0f, 1e30f}) {
    std::vector<float> x(64);
    for (float& value : x) value = size * normal(generator);
    std::vector<int16_t> q(x.size());
    const float scale = ToFixedPoint(x.data(), 64, q.data());
    int largest = 0;
    for (size_t k = 0; k < x.size(); ++k) {
      EXPECT_LE(std::abs(static_cast<double>(q[k]) * scale - x[k]), 0.501 * scale) << x[k];
      largest = std::max(largest, std::abs(int{q[k]}));
    }
    EXPECT_EQ(largest, 32512);
  }
}

TEST(FixedPointTest, HalvesAreRoundedToEven) {
  const std::vector<float> x = {32512.0f, 0.5f, 1.5f, -2.5f};
  std::vector<int16_t> q(4);
  EXPECT_EQ(ToFixedPoint(x.data(), 4, q.data()), 1.0f);
  EXPECT_THAT(q, ::testing::ElementsAre(32512, 0, 2, -2));
}

TEST(FixedPointTest, NothingAndAlmostNothingIsZero) {
  for (const float value : {0.0f, 0x1p-101f, -0x1p-140f}) {
    std::vector<int16_t> q(3, 7);
    EXPECT_EQ(ToFixedPoint(std::vector<float>(3, value).data(), 3, q.data()), 0.0f);
    EXPECT_THAT(q, Each(0));
  }
}

TEST(FixedPointTest, WhatIsNotFiniteMakesTheScaleNaN) {
  for (const float value : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    std::vector<int16_t> q(2, 7);
    EXPECT_TRUE(std::isnan(ToFixedPoint(std::vector<float>{1.0f, -value}.data(), 2, q.data())));
    EXPECT_THAT(q, Each(0));
  }
}

TEST(FixedPointTest, OnlyWeightsOfFewBitsWithPlainScalesAre) {
  MatrixView matrix;
  EXPECT_EQ(FixedPointGroup(matrix), 0);
  matrix.quantization = Quantization::kInt8;
  matrix.group = 64;
  EXPECT_EQ(FixedPointGroup(matrix), 64);
  matrix.quantization = Quantization::kInt4;
  matrix.group = 32;
  EXPECT_EQ(FixedPointGroup(matrix), 32);
  matrix.quantization = Quantization::kBlocks;
  for (const BlockType type : {BlockType::kQ8_0, BlockType::kQ4_0}) {
    matrix.blocks = type;
    EXPECT_EQ(FixedPointGroup(matrix), 32);
  }
  for (const BlockType type : {BlockType::kQ4_1, BlockType::kQ5_0, BlockType::kQ5_1, BlockType::kQ6_K}) {
    matrix.blocks = type;
    EXPECT_EQ(FixedPointGroup(matrix), 0);
  }
}

}  // namespace
}  // namespace rwkv::kernels
