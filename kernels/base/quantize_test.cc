#include "kernels/base/quantize.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "kernels/base/matrix.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

// One quantized row and its memory.
struct Row {
  MatrixView view() const {
    MatrixView matrix = {DType::kFloat16, 1, count, codes.data()};
    matrix.quantization = quantization;
    matrix.group = group;
    matrix.scales = scales.data();
    if (!minimums.empty()) matrix.minimums = minimums.data();
    return matrix;
  }
  Quantization quantization;
  int64_t group;
  int64_t count;
  std::vector<uint8_t> codes;
  std::vector<uint16_t> scales;
  std::vector<uint16_t> minimums;
};

Row Quantize(Quantization quantization, int64_t group, const std::vector<float>& weights) {
  Row row = {quantization, group, static_cast<int64_t>(weights.size()), {}, {}, {}};
  const auto groups = static_cast<size_t>((row.count + group - 1) / group);
  row.codes.resize(static_cast<size_t>(RowBytes(row.view())));
  row.scales.resize(groups);
  if (quantization == Quantization::kInt4) row.minimums.resize(groups);
  EXPECT_OK(QuantizeRow(quantization, group, weights.data(), row.count, row.codes.data(), row.scales.data(),
                        row.minimums.empty() ? nullptr : row.minimums.data()));
  return row;
}

std::vector<float> Uniforms(int64_t count, float low, float high) {
  std::mt19937 generator(5);
  std::uniform_real_distribution<float> distribution(low, high);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = distribution(generator);
  return values;
}

struct Case {
  std::string name;
  int64_t group = 32;
  std::vector<float> weights = Uniforms(96, -1.0f, 1.0f);
};

std::vector<Case> Cases() {
  return {
      {"Base"},
      {"GroupsOf64", 64, Uniforms(192, -1.0f, 1.0f)},
      {"ShorterLastGroup", 32, Uniforms(71, -1.0f, 1.0f)},
      {"ShorterThanAGroup", 64, Uniforms(5, -1.0f, 1.0f)},
      {"OneWeight", 32, {-0.3f}},
      {"Zeros", 32, std::vector<float>(40)},
      {"AllAlike", 32, std::vector<float>(40, 0.1f)},
      {"FarFromZero", 32, Uniforms(64, 10.0f, 10.5f)},
      {"FarBelowZero", 32, Uniforms(64, -10.5f, -10.0f)},
      {"Tiny", 32, Uniforms(64, -1e-6f, 1e-6f)},
      {"BelowEveryHalf", 32, Uniforms(64, -1e-12f, 1e-12f)},
      {"Large", 32, Uniforms(64, -6e4f, 6e4f)},
  };
}

class QuantizeTest : public ::testing::TestWithParam<std::tuple<Quantization, Case>> {};

TEST_P(QuantizeTest, ComesBackWithinTheBound) {
  const auto& [quantization, c] = GetParam();
  const Row row = Quantize(quantization, c.group, c.weights);
  for (int64_t i = 0; i < row.count; ++i) {
    const double error = std::abs(static_cast<double>(LoadAsFloat(row.view(), 0, i)) - c.weights[i]);
    const uint16_t scale = row.scales[i / c.group];
    EXPECT_LE(error, QuantizationErrorBound(c.weights[i], scale)) << i << ": " << c.weights[i];
  }
}

// The scale is no larger than rounding to fp16 makes it: a relative 2^-10, or 2^-24 where halves are subnormal.
TEST_P(QuantizeTest, StepsAreAsSmallAsTheRangeAllows) {
  const auto& [quantization, c] = GetParam();
  const Row row = Quantize(quantization, c.group, c.weights);
  for (int64_t begin = 0; begin < row.count; begin += c.group) {
    const auto first = c.weights.begin() + begin;
    const auto [low, high] = std::minmax_element(first, first + std::min(c.group, row.count - begin));
    const double magnitude = std::max(std::abs(*low), std::abs(*high));
    const double minimum_error = magnitude * 0x1p-10 + 0x1p-24;
    const double step =
        quantization == Quantization::kInt8 ? magnitude / 127 : (double{*high} - *low + minimum_error) / 15;
    EXPECT_LE(HalfToFloat(row.scales[begin / c.group]), step * (1 + 0x1p-9) + 0x1p-24) << "group from " << begin;
  }
}

INSTANTIATE_TEST_SUITE_P(Ranges, QuantizeTest,
                         ::testing::Combine(::testing::Values(Quantization::kInt8, Quantization::kInt4),
                                            ::testing::ValuesIn(Cases())),
                         [](const auto& info) {
                           return std::string(Name(std::get<0>(info.param))) + std::get<1>(info.param).name;
                         });

// Not so for int4, whose codes need not reach 15: its range may shrink again.
TEST(QuantizeInt8Test, SecondTimeGivesTheSameWeights) {
  for (const Case& c : Cases()) {
    const Row once = Quantize(Quantization::kInt8, c.group, c.weights);
    std::vector<float> weights;
    for (int64_t i = 0; i < once.count; ++i) weights.push_back(LoadAsFloat(once.view(), 0, i));
    const Row twice = Quantize(Quantization::kInt8, c.group, weights);
    for (int64_t i = 0; i < once.count; ++i) EXPECT_EQ(LoadAsFloat(twice.view(), 0, i), weights[i]) << c.name << i;
  }
}

TEST(QuantizeErrorTest, BadWeightsAndGroupsAreInvalid) {
  const auto quantize = [](Quantization quantization, int64_t group, float weight) {
    const std::vector<float> weights = {0.5f, weight};
    uint8_t codes[2];
    uint16_t scale;
    uint16_t minimum;
    return QuantizeRow(quantization, group, weights.data(), 2, codes, &scale, &minimum);
  };
  const auto is_invalid = [](const char* message) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message));
  };
  EXPECT_OK(quantize(Quantization::kInt8, 32, 8e6f));
  EXPECT_OK(quantize(Quantization::kInt4, 64, 65504.0f));
  EXPECT_THAT(quantize(Quantization::kInt8, 32, NAN), is_invalid("weight 1 is nan"));
  EXPECT_THAT(quantize(Quantization::kInt4, 32, -std::numeric_limits<float>::infinity()), is_invalid("is -inf"));
  EXPECT_THAT(quantize(Quantization::kInt8, 32, 9e6f), is_invalid("9e+06 is too large"));
  EXPECT_THAT(quantize(Quantization::kInt4, 32, -7e4f), is_invalid("-70000 is too large"));
  EXPECT_THAT(quantize(Quantization::kInt4, 32, 1e6f), is_invalid("1e+06 is too large"));
  EXPECT_THAT(quantize(Quantization::kInt8, 16, 1.0f), is_invalid("groups of 16"));
  EXPECT_THAT(quantize(Quantization::kNone, 32, 1.0f), is_invalid("to none"));
}

}  // namespace
}  // namespace rwkv::kernels
