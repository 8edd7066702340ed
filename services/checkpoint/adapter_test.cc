#include "services/checkpoint/adapter.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/formats/element_type.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::checkpoint {
namespace {

using testing::HasSubstr;
using testing::RawTensor;
using testing::StatusIs;

constexpr int64_t kOut = 5;
constexpr int64_t kIn = 3;
constexpr int64_t kRank = 2;
constexpr double kAlpha = 6;

std::string Write(const std::string& name, const std::vector<RawTensor>& tensors) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/", name);
  EXPECT_OK(testing::WriteFileAtomically(path, testing::SafetensorsBytes(tensors)));
  return path;
}

// Element n is start + n / 4: exact in every type, as are their products here.
std::vector<float> Numbers(float start, int64_t count) {
  std::vector<float> values;
  for (int64_t n = 0; n < count; ++n) values.push_back(start + static_cast<float>(n) / 4);
  return values;
}

RawTensor Tensor16(const std::string& name, std::vector<int64_t> shape, float start) {
  RawTensor tensor{{name, ElementType::kBFloat16, std::move(shape)}, ""};
  const std::vector<float> values = Numbers(start, testing::ElementsOf(tensor.spec));
  tensor.data.resize(values.size() * 2);
  kernels::NarrowFromFloat(kernels::DType::kBFloat16, values.data(), static_cast<int64_t>(values.size()),
                           &tensor.data[0]);
  return tensor;
}

std::vector<RawTensor> Base() {
  return {Tensor16("blocks.0.att.key.weight", {kOut, kIn}, 1),
          Tensor16("blocks.0.att.value.weight", {kOut, kIn}, 2),
          Tensor16("blocks.0.att.x_k", {1, 1, kIn}, 3),
          {{"head.weight", ElementType::kInt8, {kOut, kIn}}, std::string(kOut * kIn, 'x')}};
}

RawTensor A(const std::string& name) { return Tensor16(name, {kRank, kIn}, -1); }
RawTensor B(const std::string& name) { return Tensor16(name, {kOut, kRank}, 0.5); }

std::vector<float> Floats(const Checkpoint& checkpoint, const std::string& name) {
  const auto tensor = checkpoint.Read(name);
  EXPECT_OK(tensor.status());
  std::vector<float> values(tensor->info->bytes / ElementSize(tensor->info->type));
  kernels::WidenToFloat(*WeightDType(tensor->info->type), tensor->data, static_cast<int64_t>(values.size()),
                        values.data());
  return values;
}

TEST(AdapterTest, AddsTheProductTimesAlphaOverRankAndCastsToTheStoredType) {
  for (const char* suffix : {"", ".weight"}) {
    const std::string base = Write("base.st", Base());
    const std::string adapter = Write("lora.st", {A(absl::StrCat("blocks.0.att.key.lora_A", suffix)),
                                                  B(absl::StrCat("blocks.0.att.key.lora_B", suffix))});
    ASSERT_OK_AND_ASSIGN(const auto merged, Checkpoint::OpenWithAdapter(base, {adapter, kAlpha, ""}));
    const std::vector<float> w = Numbers(1, kOut * kIn);
    const std::vector<float> a = Numbers(-1, kRank * kIn);
    const std::vector<float> b = Numbers(0.5, kOut * kRank);
    std::vector<float> expected;
    for (int64_t out = 0; out < kOut; ++out) {
      for (int64_t in = 0; in < kIn; ++in) {
        double sum = 0;
        for (int64_t k = 0; k < kRank; ++k) sum += double{b[out * kRank + k]} * a[k * kIn + in];
        const float value = static_cast<float>(w[out * kIn + in] + sum * kAlpha / kRank);
        expected.push_back(kernels::BFloat16ToFloat(kernels::FloatToBFloat16(value)));
      }
    }
    EXPECT_EQ(Floats(*merged, "blocks.0.att.key.weight"), expected);
    EXPECT_EQ(merged->Find("blocks.0.att.key.weight")->type, ElementType::kBFloat16);
    EXPECT_EQ(Floats(*merged, "blocks.0.att.value.weight"), Numbers(2, kOut * kIn));
  }
}

TEST(AdapterTest, EveryMatrixHasItsOwnRank) {
  const std::string base = Write("base.st", Base());
  const RawTensor key_a = A("blocks.0.att.key.lora_A"), key_b = B("blocks.0.att.key.lora_B");
  const RawTensor value_a = Tensor16("blocks.0.att.value.lora_A", {1, kIn}, -1);
  const RawTensor value_b = Tensor16("blocks.0.att.value.lora_B", {kOut, 1}, 0.5);
  ASSERT_OK_AND_ASSIGN(const auto both, Checkpoint::OpenWithAdapter(
                                            base, {Write("both.st", {key_a, key_b, value_a, value_b}), kAlpha, ""}));
  ASSERT_OK_AND_ASSIGN(const auto key,
                       Checkpoint::OpenWithAdapter(base, {Write("key.st", {key_a, key_b}), kAlpha, ""}));
  ASSERT_OK_AND_ASSIGN(const auto value,
                       Checkpoint::OpenWithAdapter(base, {Write("value.st", {value_a, value_b}), kAlpha, ""}));
  EXPECT_EQ(Floats(*both, "blocks.0.att.key.weight"), Floats(*key, "blocks.0.att.key.weight"));
  EXPECT_EQ(Floats(*both, "blocks.0.att.value.weight"), Floats(*value, "blocks.0.att.value.weight"));
}

TEST(AdapterTest, TrainersNamesAreThoseOfTheModel) {
  const std::string base = Write("base.st", Base());
  ASSERT_OK_AND_ASSIGN(
      const auto expected,
      Checkpoint::OpenWithAdapter(
          base, {Write("lora.st", {A("blocks.0.att.key.lora_A"), B("blocks.0.att.key.lora_B")}), kAlpha, ""}));
  const struct {
    const char* a;
    const char* b;
  } kCases[] = {
      {"_forward_module.blocks.0.att.key.lora_A", "_forward_module.blocks.0.att.key.lora_B"},
      {"model.blocks.0.att.key.lora_A", "model.blocks.0.att.key.lora_B"},
      {"base_model.model.blocks.0.att.key.lora_A.weight", "base_model.model.blocks.0.att.key.lora_B.weight"},
      {"base_model.model.model.layers.0.attn.k_proj.lora_A.weight",
       "base_model.model.model.layers.0.attn.k_proj.lora_B.weight"},
      {"base_model.model.model.layers.0.attn.k_proj.lora_A.default.weight",
       "base_model.model.model.layers.0.attn.k_proj.lora_B.default.weight"},
      {"base_model.model.rwkv.blocks.0.attention.key.lora_A.weight",
       "base_model.model.rwkv.blocks.0.attention.key.lora_B.weight"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.a);
    ASSERT_OK_AND_ASSIGN(const auto merged,
                         Checkpoint::OpenWithAdapter(base, {Write("lora.st", {A(test.a), B(test.b)}), kAlpha, ""}));
    EXPECT_EQ(Floats(*merged, "blocks.0.att.key.weight"), Floats(*expected, "blocks.0.att.key.weight"));
  }
}

TEST(AdapterTest, WebRwkvsFirstFactorIsTransposed) {
  const std::string base = Write("base.st", Base());
  const RawTensor a = A("blocks.0.att.key.lora_A");
  RawTensor transposed{{"blocks.0.att.key.lora.0", ElementType::kBFloat16, {kIn, kRank}}, ""};
  for (int64_t in = 0; in < kIn; ++in) {
    for (int64_t k = 0; k < kRank; ++k) transposed.data += a.data.substr((k * kIn + in) * 2, 2);
  }
  ASSERT_OK_AND_ASSIGN(
      const auto expected,
      Checkpoint::OpenWithAdapter(base, {Write("lora.st", {a, B("blocks.0.att.key.lora_B")}), kAlpha, ""}));
  ASSERT_OK_AND_ASSIGN(
      const auto merged,
      Checkpoint::OpenWithAdapter(base, {Write("lora.st", {transposed, B("blocks.0.att.key.lora.1")}), kAlpha, ""}));
  EXPECT_EQ(Floats(*merged, "blocks.0.att.key.weight"), Floats(*expected, "blocks.0.att.key.weight"));
}

TEST(AdapterTest, AnyDivisionReadsTheSame) {
  const std::string base = Write("base.st", Base());
  const std::string adapter = Write("lora.st", {A("blocks.0.att.key.lora_A"), B("blocks.0.att.key.lora_B")});
  ASSERT_OK_AND_ASSIGN(const auto merged, Checkpoint::OpenWithAdapter(base, {adapter, 1.7, ""}));
  const TensorInfo& info = *merged->Find("blocks.0.att.key.weight");
  std::vector<uint8_t> whole(info.bytes);
  ASSERT_OK(merged->ReadBytes(info, 0, absl::MakeSpan(whole)));
  for (int64_t piece : {2, 4, 8}) {
    std::vector<uint8_t> pieces(info.bytes);
    for (int64_t at = 0; at < info.bytes; at += piece) {
      ASSERT_OK(merged->ReadBytes(info, at, absl::MakeSpan(pieces).subspan(at, std::min(piece, info.bytes - at))));
    }
    EXPECT_EQ(pieces, whole) << "in pieces of " << piece;
  }
}

TEST(AdapterTest, TensorsTrainedWholeTakeThePlaceOfTheBases) {
  const std::string base = Write("base.st", Base());
  RawTensor trained = Tensor16("blocks.0.att.x_k", {kIn}, 7);
  trained.spec.type = ElementType::kFloat32;
  const float values[] = {7, 7.1f, 7.2f};
  trained.data.assign(reinterpret_cast<const char*>(values), sizeof(values));
  const std::string adapter = Write("lora.st", {A("blocks.0.att.key.lora_A"), B("blocks.0.att.key.lora_B"), trained});
  ASSERT_OK_AND_ASSIGN(const auto merged, Checkpoint::OpenWithAdapter(base, {adapter, kAlpha, ""}));
  EXPECT_EQ(Floats(*merged, "blocks.0.att.x_k"), (std::vector<float>{7, 7.1f, 7.2f}));
}

// W - B0 A0 + B A, without alpha.
TEST(AdapterTest, PissaTakesItsInitialFactorsOut) {
  const std::string base = Write("base.st", Base());
  const std::string initial = Write("init.st", {Tensor16("model.blocks.0.att.key.init_lora_A", {kRank, kIn}, 0.25),
                                                Tensor16("model.blocks.0.att.key.init_lora_B", {kOut, kRank}, -0.5)});
  const std::string adapter = Write("lora.st", {A("blocks.0.att.key.lora_A"), B("blocks.0.att.key.lora_B")});
  ASSERT_OK_AND_ASSIGN(const auto merged, Checkpoint::OpenWithAdapter(base, {adapter, absl::nullopt, initial}));
  const std::vector<float> w = Numbers(1, kOut * kIn);
  const std::vector<float> a = Numbers(-1, kRank * kIn), b = Numbers(0.5, kOut * kRank);
  const std::vector<float> a0 = Numbers(0.25, kRank * kIn), b0 = Numbers(-0.5, kOut * kRank);
  std::vector<float> expected;
  for (int64_t out = 0; out < kOut; ++out) {
    for (int64_t in = 0; in < kIn; ++in) {
      double sum = w[out * kIn + in];
      for (int64_t k = 0; k < kRank; ++k) {
        sum += double{b[out * kRank + k]} * a[k * kIn + in] - double{b0[out * kRank + k]} * a0[k * kIn + in];
      }
      expected.push_back(kernels::BFloat16ToFloat(kernels::FloatToBFloat16(static_cast<float>(sum))));
    }
  }
  EXPECT_EQ(Floats(*merged, "blocks.0.att.key.weight"), expected);
  EXPECT_THAT(Checkpoint::OpenWithAdapter(base, {adapter, 2, initial}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("PiSSA adapter has none")));
  EXPECT_THAT(Checkpoint::OpenWithAdapter(base, {adapter, absl::nullopt, adapter}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("has no initial factors")));
  EXPECT_THAT(Checkpoint::OpenWithAdapter(base, {adapter, absl::nullopt, ""}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("alpha is not given")));
}

// D [2, 5] is added to every two columns; the third and last column takes the first row again.
TEST(AdapterTest, DishaIsAddedBlockByBlock) {
  const std::string base = Write("base.st", Base());
  for (const char* kind : {"disha", "bone"}) {
    const std::string adapter =
        Write("disha.st", {Tensor16(absl::StrCat("blocks.0.att.key.", kind), {kRank, kOut}, -3)});
    ASSERT_OK_AND_ASSIGN(const auto merged, Checkpoint::OpenWithAdapter(base, {adapter, absl::nullopt, ""}));
    const std::vector<float> w = Numbers(1, kOut * kIn), d = Numbers(-3, kRank * kOut);
    std::vector<float> expected;
    for (int64_t out = 0; out < kOut; ++out) {
      for (const int64_t row : {0, 1, 0}) {
        expected.push_back(w[expected.size()] + d[row * kOut + out]);
      }
    }
    EXPECT_EQ(Floats(*merged, "blocks.0.att.key.weight"), expected);
  }
}

TEST(AdapterTest, WhatDoesNotFitIsRefusedByName) {
  const std::string base = Write("base.st", Base());
  const RawTensor a = A("blocks.0.att.key.lora_A");
  const RawTensor b = B("blocks.0.att.key.lora_B");
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const struct {
    const char* name;
    double alpha;
    std::vector<RawTensor> tensors;
    absl::StatusCode code;
    const char* message;
  } kCases[] = {
      {"alpha of zero", 0, {a, b}, absl::StatusCode::kInvalidArgument, "lora.st: alpha is 0"},
      {"infinite alpha",
       std::numeric_limits<double>::infinity(),
       {a, b},
       absl::StatusCode::kInvalidArgument,
       "alpha is inf"},
      {"alpha of NaN", nan, {a, b}, absl::StatusCode::kInvalidArgument, "alpha is nan"},
      {"no adapter",
       1,
       {Tensor16("blocks.0.att.x_k", {kIn}, 0)},
       absl::StatusCode::kInvalidArgument,
       "lora.st: is no LoRA adapter"},
      {"half a pair", 1, {a}, absl::StatusCode::kInvalidArgument, "\"blocks.0.att.key.lora_A\" has no other half"},
      {"a factor twice",
       1,
       {a, b, A("blocks.0.att.key.lora_A.weight")},
       absl::StatusCode::kInvalidArgument,
       "are the same factor"},
      {"two ranks",
       1,
       {Tensor16("blocks.0.att.key.lora_A", {kRank + 1, kIn}, 0), b},
       absl::StatusCode::kInvalidArgument,
       "are not [rank, in] and [out, rank]"},
      {"not a matrix",
       1,
       {Tensor16("blocks.0.att.key.lora_A", {kIn}, 0), b},
       absl::StatusCode::kInvalidArgument,
       "are not [rank, in]"},
      {"a wider matrix",
       1,
       {Tensor16("blocks.0.att.key.lora_A", {kRank, kIn + 1}, 0), b},
       absl::StatusCode::kInvalidArgument,
       "the model's has shape [5, 3]"},
      {"a matrix the model has not",
       1,
       {A("blocks.7.att.key.lora_A"), B("blocks.7.att.key.lora_B")},
       absl::StatusCode::kInvalidArgument,
       "\"blocks.7.att.key.weight\", which the model has not"},
      {"a vector the model has not",
       1,
       {a, b, Tensor16("blocks.0.att.x_q", {kIn}, 0)},
       absl::StatusCode::kInvalidArgument,
       "\"blocks.0.att.x_q\" of shape [3] is not in the model"},
      {"a vector of another size",
       1,
       {a, b, Tensor16("blocks.0.att.x_k", {kIn + 1}, 0)},
       absl::StatusCode::kInvalidArgument,
       "\"blocks.0.att.x_k\" of shape [4] would replace"},
      {"a quantized matrix",
       1,
       {A("head.lora_A"), B("head.lora_B")},
       absl::StatusCode::kFailedPrecondition,
       "\"head.weight\", which is int8"},
      {"integers",
       1,
       {a, b, {{"blocks.0.att.x_k", ElementType::kUint8, {3}}, "abc"}},
       absl::StatusCode::kInvalidArgument,
       "\"blocks.0.att.x_k\" is uint8"},
      {"DoRA", 1, {a, b, A("blocks.0.att.key.lora_magnitude_vector")}, absl::StatusCode::kUnimplemented, "a DoRA"},
      {"DiSHA with an alpha",
       1,
       {A("blocks.0.att.key.disha")},
       absl::StatusCode::kInvalidArgument,
       "DiSHA adapter has none"},
      {"DiSHA of blocks",
       1,
       {Tensor16("blocks.0.att.key.disha", {1, 3, 3}, 0)},
       absl::StatusCode::kUnimplemented,
       "mode bone"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    EXPECT_THAT(Checkpoint::OpenWithAdapter(base, {Write("lora.st", test.tensors), test.alpha, ""}),
                StatusIs(test.code, HasSubstr(test.message)));
  }
  EXPECT_THAT(Checkpoint::OpenWithAdapter(base, {"/no/such.st", 1, ""}), StatusIs(absl::StatusCode::kNotFound));
}

}  // namespace
}  // namespace rwkv::checkpoint
