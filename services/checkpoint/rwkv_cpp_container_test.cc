// Files of rwkv.cpp: what its converter applied is taken back.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/container_testing.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/formats/tensor_record.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::checkpoint {
namespace {

using testing::GgmlTensor;
using testing::HasSubstr;
using testing::StatusIs;

GgmlTensor Fp32(const std::string& name, std::vector<int64_t> shape, std::vector<float> values) {
  return {name, 0, std::move(shape),
          std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float))};
}

TEST(RwkvCppDialectTest, TakesBackWhatTheConverterApplied) {
  const float x = 0.75f;
  const GgmlTensor emb = Fp32("emb.weight", {2, 1}, {0, 0});
  const std::string v4 = testing::RwkvCppBytes(
      {100, 2, 1, 1},
      {emb, Fp32("blocks.0.att.time_decay", {1}, {-std::exp(x)}), Fp32("blocks.0.att.time_first", {1}, {x})});
  ASSERT_OK_AND_ASSIGN(const auto four, OpenBytes(v4));
  EXPECT_FLOAT_EQ(Weights(*four, "blocks.0.att.time_decay")[0], x);
  EXPECT_EQ(Weights(*four, "blocks.0.att.time_first")[0], x);

  const GgmlTensor ln_x = Fp32("blocks.0.att.ln_x.weight", {2}, {1, 1});
  const std::string v5 = testing::RwkvCppBytes(
      {101, 2, 1, 1}, {emb, ln_x, Fp32("blocks.0.att.time_decay", {2, 1, 1}, {std::exp(-std::exp(x)), 0.5f}),
                       Fp32("blocks.0.att.time_first", {2, 1, 1}, {std::exp(x), 1})});
  ASSERT_OK_AND_ASSIGN(const auto five, OpenBytes(v5));
  EXPECT_FLOAT_EQ(Weights(*five, "blocks.0.att.time_decay")[0], x);
  EXPECT_FLOAT_EQ(Weights(*five, "blocks.0.att.time_first")[0], x);
  EXPECT_EQ(Weights(*five, "blocks.0.att.time_first")[1], 0);
  EXPECT_EQ(five->Find("blocks.0.att.time_first")->shape, std::vector<int64_t>{2});

  const std::string v52 = testing::RwkvCppBytes(
      {101, 2, 1, 1}, {emb, ln_x, Fp32("blocks.0.att.time_faaaa", {2, 3, 1}, {1, 2, 3, 4, 5, 6})});
  ASSERT_OK_AND_ASSIGN(const auto channels, OpenBytes(v52));
  EXPECT_EQ(channels->Find("blocks.0.att.time_faaaa")->shape, (std::vector<int64_t>{2, 3}));
}

TEST(RwkvCppDialectTest, AHeaderThatContradictsTheTensorsIsRefused) {
  const GgmlTensor emb = Fp32("emb.weight", {2, 1}, {0, 0});
  const GgmlTensor norm = Fp32("blocks.1.ln1.weight", {1}, {0});
  const struct {
    testing::RwkvCppHeader header;
    const char* message;
  } kCases[] = {
      {{101, 3, 1, 2}, "emb.weight is [2, 1], but the header says 3 tokens of 1"},
      {{101, 2, 2, 2}, "but the header says 2 tokens of 2"},
      {{101, 2, 1, 3}, "the header says 3 layers; there are tensors of 2"},
      {{101, 2, 1, 1}, "the header says 1 layers; there are tensors of 2"},
      {{101, 2, 1, 0xffffffff}, "the header says -1 layers"},
  };
  for (const auto& test : kCases) {
    EXPECT_THAT(OpenBytes(testing::RwkvCppBytes(test.header, {emb, norm})),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(test.message)));
  }
  EXPECT_THAT(OpenBytes(testing::RwkvCppBytes({101, 2, 1, 1},
                                              {emb, {"blocks.0.att.time_decay", 1, {1}, std::string(2, '\0')}})),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("\"blocks.0.att.time_decay\" is not fp32")));
}

// Files written by rwkv.cpp itself, against the same models with original names. These are not in the repository.
TEST(RwkvCppDialectTest, PublishedFilesHoldTheModelsTheyWereMadeFrom) {
  const char* shared = std::getenv("RWKV_SHARED");
  if (shared == nullptr) GTEST_SKIP() << "RWKV_SHARED is not set";
  for (const char* version : {"4v0-660K", "5v2-730K", "7v0-834K"}) {
    SCOPED_TRACE(version);
    ASSERT_OK_AND_ASSIGN(const auto file,
                         Checkpoint::Open(absl::StrCat(shared, "/data/rwkvcpp/tiny-rwkv-", version, "-FP32.bin")));
    ASSERT_OK_AND_ASSIGN(
        const auto original,
        Checkpoint::Open(absl::StrCat(shared, "/data/models/tiny-", absl::string_view(version, 3), ".safetensors")));
    ASSERT_EQ(file->tensors().size(), original->tensors().size());
    for (const TensorInfo& info : original->tensors()) {
      const TensorInfo* found = file->Find(info.name);
      ASSERT_NE(found, nullptr) << info.name;
      EXPECT_EQ(WithoutUnits(found->shape), WithoutUnits(info.shape)) << info.name;
      const std::vector<float> expected = Weights(*original, info.name);
      const std::vector<float> weights = Weights(*file, info.name);
      ASSERT_EQ(weights.size(), expected.size()) << info.name;
      for (size_t i = 0; i < weights.size(); ++i) {
        // Decays of RWKV-4 and 5 went through exp and back: one unit in the last place.
        const float tolerance = absl::EndsWith(info.name, ".time_decay") ? std::abs(expected[i]) * 0x1p-23f : 0;
        ASSERT_TRUE(!(std::abs(weights[i] - expected[i]) > tolerance))
            << info.name << "[" << i << "]: " << weights[i] << ", not " << expected[i];
      }
    }
  }
}

// The original of this one is known to us only as dequantized from Q5_1 and rounded to fp16.
TEST(RwkvCppDialectTest, APublishedQuantizedFileIsCloseToItsModel) {
  const char* shared = std::getenv("RWKV_SHARED");
  if (shared == nullptr) GTEST_SKIP() << "RWKV_SHARED is not set";
  ASSERT_OK_AND_ASSIGN(const auto file,
                       Checkpoint::Open(absl::StrCat(shared, "/data/rwkvcpp/tiny-rwkv-6v0-3m-Q5_0.bin")));
  ASSERT_OK_AND_ASSIGN(const auto original,
                       Checkpoint::Open(absl::StrCat(shared, "/data/models/tiny-6v0-f16.safetensors")));
  EXPECT_EQ(file->Find("blocks.0.att.key.weight")->type, ElementType::kInt8);
  for (const TensorInfo& info : original->tensors()) {
    const std::vector<float> expected = Weights(*original, info.name);
    const std::vector<float> weights = Weights(*file, info.name);
    ASSERT_EQ(weights.size(), expected.size()) << info.name;
    double difference = 0;
    double size = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      difference += std::pow(double{weights[i]} - expected[i], 2);
      size += std::pow(expected[i], 2);
    }
    // Steps of a 16th of a block's largest weight: a twentieth of the weights' root mean square.
    EXPECT_TRUE(difference <= size / 100) << info.name << ": " << std::sqrt(difference / size);
  }
}

}  // namespace
}  // namespace rwkv::checkpoint
