// Every container and dialect against the same model with its original names.
#include "services/checkpoint/container.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "kernels/base/ggml_blocks.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/formats/tensor_record.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::checkpoint {
namespace {

using testing::ElementsAre;
using testing::GgmlTensor;
using testing::GgufKey;
using testing::GgufText;
using testing::GgufUint32;
using testing::HasSubstr;
using testing::RawTensor;
using testing::StatusIs;

constexpr char kTestdata[] = "services/checkpoint/testdata/";

std::string WriteTemporary(const std::string& name, const std::string& bytes) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/", name);
  EXPECT_OK(testing::WriteFileAtomically(path, bytes));
  return path;
}

absl::StatusOr<std::shared_ptr<const Checkpoint>> OpenBytes(const std::string& bytes) {
  return Checkpoint::Open(WriteTemporary("file", bytes));
}

std::vector<float> Floats(const Tensor& tensor) {
  if (tensor.blocks != BlockType::kNone) {
    std::vector<float> values(tensor.bytes / kernels::BlockBytes(tensor.blocks) * kernels::BlockWeights(tensor.blocks));
    kernels::DecodeBlocks(tensor.blocks, BlockPart::kWeights, static_cast<const uint8_t*>(tensor.data),
                          tensor.bytes / kernels::BlockBytes(tensor.blocks), reinterpret_cast<uint8_t*>(values.data()));
    return values;
  }
  std::vector<float> values(tensor.info->bytes / ElementSize(tensor.info->type));
  kernels::WidenToFloat(*WeightDType(tensor.info->type), tensor.data, static_cast<int64_t>(values.size()),
                        values.data());
  return values;
}

// A tensor's values, put together where it is a pair.
std::vector<float> Weights(const Checkpoint& checkpoint, const std::string& name) {
  const absl::StatusOr<Tensor> tensor = checkpoint.Read(name);
  if (!tensor.ok()) {
    ADD_FAILURE() << tensor.status();
    return {};
  }
  if (WeightDType(tensor->info->type).has_value()) return Floats(*tensor);
  const std::vector<float> scales = Floats(*checkpoint.Read(absl::StrCat(name, ".scale")));
  const bool is_int4 = tensor->info->type == ElementType::kUint8;
  const std::vector<float> minimums =
      is_int4 ? Floats(*checkpoint.Read(absl::StrCat(name, ".min"))) : std::vector<float>(scales.size());
  const uint8_t* quants = static_cast<const uint8_t*>(tensor->data);
  std::vector<float> out(tensor->info->bytes * (is_int4 ? 2 : 1));
  for (size_t i = 0; i < out.size(); ++i) {
    const int q = !is_int4 ? static_cast<int8_t>(quants[i]) : i % 2 == 0 ? quants[i / 2] & 15 : quants[i / 2] >> 4;
    const float product = static_cast<float>(q) * scales[i / 32];
    out[i] = product + minimums[i / 32];
  }
  return out;
}

// As `type` holds them.
std::vector<float> Rounded(std::vector<float> values, ElementType type) {
  const kernels::DType dtype = WeightDType(type).value_or(kernels::DType::kFloat32);
  for (float& value : values) {
    uint32_t bits = 0;
    kernels::NarrowFromFloat(dtype, &value, 1, &bits);
    kernels::WidenToFloat(dtype, &bits, 1, &value);
  }
  return values;
}

std::vector<int64_t> WithoutUnits(std::vector<int64_t> shape) {
  shape.erase(std::remove(shape.begin(), shape.end(), 1), shape.end());
  return shape;
}

struct DialectFile {
  const char* file;
  const char* original;
  const char* format;
  const char* dialect;
};

class DialectFilesTest : public ::testing::TestWithParam<DialectFile> {};

TEST_P(DialectFilesTest, HoldsTheOriginalsTensors) {
  ASSERT_OK_AND_ASSIGN(const auto original, Checkpoint::Open(absl::StrCat(kTestdata, GetParam().original)));
  ASSERT_OK_AND_ASSIGN(const auto file, Checkpoint::Open(absl::StrCat(kTestdata, GetParam().file)));
  EXPECT_EQ(file->format(), GetParam().format);
  EXPECT_EQ(file->dialect(), GetParam().dialect);
  for (const TensorInfo& info : original->tensors()) {
    SCOPED_TRACE(info.name);
    const TensorInfo* found = file->Find(info.name);
    ASSERT_NE(found, nullptr);
    std::vector<int64_t> shape = found->shape;
    if (found->type == ElementType::kUint8) shape.back() *= 2;  // Two weights a byte.
    EXPECT_EQ(WithoutUnits(shape), WithoutUnits(info.shape));
    EXPECT_EQ(Weights(*file, info.name), Rounded(Weights(*original, info.name), found->type));
  }
  for (const TensorInfo& info : file->tensors()) {
    if (absl::EndsWith(info.name, ".scale") || absl::EndsWith(info.name, ".min")) continue;
    EXPECT_NE(original->Find(info.name), nullptr) << info.name << " is not in the original";
  }
}

// What a stage computes with: blocks as they are, matrices and low-rank factors either way round.
TEST_P(DialectFilesTest, FormsOfAMatrixHoldTheSameWeights) {
  ASSERT_OK_AND_ASSIGN(const auto file, Checkpoint::Open(absl::StrCat(kTestdata, GetParam().file)));
  for (const TensorInfo& info : file->tensors()) {
    if (info.shape.size() < 2 || absl::EndsWith(info.name, ".scale") || absl::EndsWith(info.name, ".min")) continue;
    SCOPED_TRACE(info.name);
    const std::vector<float> expected = Weights(*file, info.name);
    ASSERT_OK_AND_ASSIGN(const Tensor matrix, file->Read(info.name, Form::kMatrix));
    EXPECT_EQ(Floats(matrix), expected);
    if (matrix.blocks != BlockType::kNone) continue;  // Its transpose would be in another order.
    const int64_t cols = info.shape.back();
    const int64_t rows = info.shape[info.shape.size() - 2];
    ASSERT_OK_AND_ASSIGN(const Tensor transposed, file->Read(info.name, Form::kTransposed));
    const std::vector<float> turned = Floats(transposed);
    ASSERT_EQ(turned.size(), expected.size());
    for (int64_t i = 0; i < static_cast<int64_t>(expected.size()); ++i) {
      const int64_t in_one = i % (rows * cols);
      ASSERT_EQ(turned[i - in_one + in_one % cols * rows + in_one / cols], expected[i]) << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Files, DialectFilesTest,
    ::testing::Values(DialectFile{"v7.gguf", "v7.safetensors", "gguf", ""},
                      DialectFile{"v6.gguf", "v6.safetensors", "gguf", ""},
                      DialectFile{"v7.st", "v7.safetensors", "safetensors", "web-rwkv"},
                      DialectFile{"v6.st", "v6.safetensors", "safetensors", "web-rwkv"},
                      DialectFile{"v7_fla.safetensors", "v7.safetensors", "safetensors", "hugging-face"},
                      DialectFile{"v7_fla_stacked.safetensors", "v7.safetensors", "safetensors", "hugging-face"},
                      DialectFile{"v6_fla.safetensors", "v6.safetensors", "safetensors", "hugging-face"}),
    [](const auto& info) {
      std::string name = info.param.file;
      std::replace(name.begin(), name.end(), '.', '_');
      return name;
    });

TEST(GgufDialectTest, QuantizedMatricesBecomePairs) {
  ASSERT_OK_AND_ASSIGN(const auto file, Checkpoint::Open(absl::StrCat(kTestdata, "v7.gguf")));
  EXPECT_EQ(file->metadata().at("quantisation.group"), "32");
  const struct {
    const char* name;
    ElementType type;
    bool has_scale;
    bool has_minimum;
  } kCases[] = {
      {"blocks.1.att.receptance.weight", ElementType::kInt8, true, false},  // Q8_0
      {"blocks.1.att.key.weight", ElementType::kInt8, true, false},         // Q4_0
      {"blocks.1.att.value.weight", ElementType::kInt8, true, false},       // Q5_0
      {"blocks.1.att.output.weight", ElementType::kUint8, true, true},      // Q4_1
      {"blocks.1.ffn.key.weight", ElementType::kFloat32, false, false},     // Q5_1
      {"blocks.1.ffn.value.weight", ElementType::kBFloat16, false, false},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    EXPECT_EQ(file->Find(test.name)->type, test.type);
    EXPECT_EQ(file->Find(absl::StrCat(test.name, ".scale")) != nullptr, test.has_scale);
    EXPECT_EQ(file->Find(absl::StrCat(test.name, ".min")) != nullptr, test.has_minimum);
  }
}

TEST(GgufDialectTest, AHalvedMatrixInBlocksIsTakenBack) {
  // The converter has halved layer 1's once: one block of the scale 0.5, every code 3.
  const std::string block = absl::StrCat(std::string("\x00\x38", 2), std::string(32, '\3'));
  ASSERT_OK_AND_ASSIGN(const auto file,
                       OpenBytes(testing::GgufBytes(std::vector<GgufKey>{GgufText("general.architecture", "rwkv6"),
                                                                         GgufUint32("rwkv6.rescale_every_n_layers", 1)},
                                                    std::vector<GgmlTensor>{
                                                        {"blk.1.time_mix_output.weight", 8, {1, 32}, block},
                                                    })));
  ASSERT_OK_AND_ASSIGN(const Tensor matrix, file->Read("blocks.1.att.output.weight", Form::kMatrix));
  EXPECT_EQ(matrix.blocks, BlockType::kQ8_0);
  EXPECT_EQ(Floats(matrix), std::vector<float>(32, 3.0f));
  EXPECT_EQ(Weights(*file, "blocks.1.att.output.weight"), std::vector<float>(32, 3.0f));
}

TEST(GgufDialectTest, BringsItsVocabulary) {
  ASSERT_OK_AND_ASSIGN(const auto file, Checkpoint::Open(absl::StrCat(kTestdata, "v7.gguf")));
  ASSERT_OK_AND_ASSIGN(const std::vector<std::string> vocabulary, file->Vocabulary());
  EXPECT_THAT(vocabulary, ElementsAre("", std::string(1, '\0'), "\\", "it's", "\t\n\r\xe4\xbd\xa0", ""));
  EXPECT_EQ(file->metadata().at("general.name"), "small");
  ASSERT_OK_AND_ASSIGN(const auto other, Checkpoint::Open(absl::StrCat(kTestdata, "v7.safetensors")));
  EXPECT_THAT(other->Vocabulary(), StatusIs(absl::StatusCode::kNotFound, HasSubstr("brings no vocabulary")));
}

TEST(GgufDialectTest, AVocabularyOfAnotherKindOrMalformedIsRefused) {
  const GgufKey architecture = GgufText("general.architecture", "rwkv7");
  const std::string other =
      testing::GgufBytes(std::vector<GgufKey>{architecture, GgufText("tokenizer.ggml.model", "gpt2"),
                                              testing::GgufTexts("tokenizer.ggml.tokens", {"a"})},
                         {});
  ASSERT_OK_AND_ASSIGN(const auto gpt2, OpenBytes(other));
  EXPECT_THAT(gpt2->Vocabulary(), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("\"gpt2\"")));
  for (const char* token : {"\\", "a\\x", "\\x4", "\\xgg"}) {
    const std::string file =
        testing::GgufBytes(std::vector<GgufKey>{architecture, GgufText("tokenizer.ggml.model", "rwkv"),
                                                testing::GgufTexts("tokenizer.ggml.tokens", {"<s>", token})},
                           {});
    ASSERT_OK_AND_ASSIGN(const auto checkpoint, OpenBytes(file));
    EXPECT_THAT(checkpoint->Vocabulary(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("token 1")));
  }
}

TEST(GgufDialectTest, WhatIsNoRwkvIsRefusedByName) {
  const auto file = [](const std::string& architecture, uint32_t head_size, const GgmlTensor& tensor) {
    return testing::GgufBytes(std::vector<GgufKey>{GgufText("general.architecture", architecture),
                                                   GgufUint32(absl::StrCat(architecture, ".wkv.head_size"), head_size)},
                              std::vector<GgmlTensor>{tensor});
  };
  const auto zeros = [](const std::string& name, std::vector<int64_t> shape) {
    int64_t elements = 1;
    for (int64_t size : shape) elements *= size;
    return GgmlTensor{name, 0, shape, std::string(elements * 4, '\0')};
  };
  const struct {
    const char* name;
    std::string file;
    absl::StatusCode code;
    const char* message;
  } kCases[] = {
      {"llama", file("llama", 64, zeros("a", {1})), absl::StatusCode::kUnimplemented, "architecture \"llama\""},
      {"no architecture", testing::GgufBytes({}, {}), absl::StatusCode::kUnimplemented, "architecture \"\""},
      {"heads that do not fit", file("rwkv7", 3, zeros("blk.0.time_mix_r_k.weight", {64})),
       absl::StatusCode::kInvalidArgument, "has 64 elements, but rwkv7.wkv.head_size is 3"},
      {"heads of nothing", file("rwkv7", 0, zeros("blk.0.time_mix_r_k.weight", {64})),
       absl::StatusCode::kInvalidArgument, "head_size is 0"},
      {"a negative head size", file("rwkv7", 0x80000000, zeros("a", {1})), absl::StatusCode::kInvalidArgument,
       "rwkv7.wkv.head_size is \"2147483648\""},
      {"five fused of six", file("rwkv7", 4, zeros("blk.0.time_mix_lerp_fused.weight", {5, 1, 1, 4})),
       absl::StatusCode::kInvalidArgument, "not [6, 1, width]"},
      {"a factor of one dimension", file("rwkv7", 4, zeros("blk.0.time_mix_w1.weight", {4})),
       absl::StatusCode::kInvalidArgument, "not one of 2 dimensions"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    EXPECT_THAT(OpenBytes(test.file), StatusIs(test.code, HasSubstr(test.message)));
  }
}

RawTensor Bytes(const std::string& name, std::vector<int64_t> shape) {
  RawTensor tensor{{name, ElementType::kUint8, std::move(shape)}, ""};
  for (int64_t i = 0; i < testing::ElementsOf(tensor.spec); ++i) tensor.data.push_back(static_cast<char>(i));
  return tensor;
}

// Which tensors a safetensors file of these has, with shapes: "name[2, 3]".
std::vector<std::string> NamesAndShapes(const Checkpoint& checkpoint) {
  std::vector<std::string> out;
  for (const TensorInfo& info : checkpoint.tensors()) out.push_back(absl::StrCat(info.name, ShapeString(info.shape)));
  return out;
}

TEST(WebRwkvDialectTest, IsToldByWhatNoOriginalHas) {
  const RawTensor emb = Bytes("emb.weight", {9, 4});
  const RawTensor r_k = Bytes("blocks.0.att.r_k", {2, 2});
  const struct {
    const char* name;
    std::vector<RawTensor> tensors;
    const char* dialect;
  } kCases[] = {
      {"v7", {emb, r_k, Bytes("blocks.0.att.w1", {2, 4})}, "web-rwkv"},
      {"v7 original", {emb, r_k, Bytes("blocks.0.att.w1", {4, 2})}, ""},
      {"v7 original of a large rank", {emb, r_k, Bytes("blocks.0.att.w1", {4, 8})}, ""},
      {"v7 of a large rank", {emb, r_k, Bytes("blocks.0.att.g1", {8, 4})}, "web-rwkv"},
      {"v7 where the first factor is square",
       {emb, r_k, Bytes("blocks.0.att.w1", {4, 4}), Bytes("blocks.0.att.g1", {8, 4})},
       "web-rwkv"},
      {"v7 where all factors are square", {emb, r_k, Bytes("blocks.0.att.w1", {4, 4})}, ""},
      {"v7 without embedding", {r_k, Bytes("blocks.0.att.w1", {2, 4})}, ""},
      {"v6", {emb, Bytes("blocks.0.att.time_mix_w1", {10, 4})}, "web-rwkv"},
      {"v5.2", {emb, Bytes("blocks.0.att.time_first", {2, 2})}, "web-rwkv"},
      {"v5.0, whose time_first is exp's", {emb, Bytes("blocks.0.att.time_first", {2})}, ""},
      {"v5.0 with dimensions of one", {emb, Bytes("blocks.0.att.time_first", {2, 1, 1})}, ""},
      {"v4", {emb, Bytes("blocks.0.att.time_first", {4}), Bytes("blocks.0.att.time_mix_k", {1, 1, 4})}, ""},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    ASSERT_OK_AND_ASSIGN(const auto checkpoint, OpenBytes(testing::SafetensorsBytes(test.tensors)));
    EXPECT_EQ(checkpoint->dialect(), test.dialect);
  }
}

TEST(WebRwkvDialectTest, OldScriptsSwappedOtherDimensions) {
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{5, 4, 2}, std::vector<int64_t>{2, 5, 4}}) {
    ASSERT_OK_AND_ASSIGN(const auto checkpoint,
                         OpenBytes(testing::SafetensorsBytes(std::vector<RawTensor>{
                             Bytes("blocks.0.att.time_mix_w1", {10, 4}), Bytes("blocks.0.att.time_mix_w2", shape)})));
    EXPECT_THAT(NamesAndShapes(*checkpoint),
                ElementsAre("blocks.0.att.time_maa_w1[4, 10]", "blocks.0.att.time_maa_w2[5, 2, 4]"));
  }
}

TEST(WebRwkvDialectTest, TunedStatesAreTransposed) {
  ASSERT_OK_AND_ASSIGN(const auto checkpoint,
                       OpenBytes(testing::SafetensorsBytes(std::vector<RawTensor>{
                           Bytes("blocks.0.att.time_first", {2, 2}), Bytes("blocks.0.att.time_state", {2, 2, 2})})));
  ASSERT_OK_AND_ASSIGN(const Tensor state, checkpoint->Read("blocks.0.att.time_state"));
  const uint8_t* bytes = static_cast<const uint8_t*>(state.data);
  EXPECT_THAT(absl::MakeConstSpan(bytes, 8), ElementsAre(0, 2, 1, 3, 4, 6, 5, 7));
}

TEST(HuggingFaceDialectTest, PortsOfEarlierVersionsAreRenamed) {
  const char* const kNames[][2] = {
      {"rwkv.embeddings.weight", "emb.weight"},
      {"rwkv.ln_out.bias", "ln_out.bias"},
      {"head.weight", "head.weight"},
      {"rwkv.blocks.0.pre_ln.weight", "blocks.0.ln0.weight"},
      {"rwkv.blocks.3.ln1.weight", "blocks.3.ln1.weight"},
      {"rwkv.blocks.3.attention.time_decay", "blocks.3.att.time_decay"},
      {"rwkv.blocks.3.attention.time_mix_key", "blocks.3.att.time_mix_k"},
      {"rwkv.blocks.3.attention.time_mix_value", "blocks.3.att.time_mix_v"},
      {"rwkv.blocks.3.attention.time_mix_receptance", "blocks.3.att.time_mix_r"},
      {"rwkv.blocks.3.attention.time_mix_gate", "blocks.3.att.time_mix_g"},
      {"rwkv.blocks.3.attention.time_maa_w1", "blocks.3.att.time_maa_w1"},
      {"rwkv.blocks.3.attention.ln_x.weight", "blocks.3.att.ln_x.weight"},
      {"rwkv.blocks.3.attention.output.weight", "blocks.3.att.output.weight"},
      {"rwkv.blocks.3.feed_forward.time_mix_key", "blocks.3.ffn.time_mix_k"},
      {"rwkv.blocks.3.feed_forward.key.weight", "blocks.3.ffn.key.weight"},
  };
  for (const char* const blocks : {"rwkv.blocks.", "model.layers.", "model.model.layers."}) {
    std::vector<RawTensor> tensors;
    std::vector<std::string> expected;
    for (const auto& name : kNames) {
      tensors.push_back(Bytes(absl::StrReplaceAll(name[0], {{"rwkv.blocks.", blocks}}), {1}));
      expected.push_back(name[1]);
    }
    ASSERT_OK_AND_ASSIGN(const auto checkpoint, OpenBytes(testing::SafetensorsBytes(tensors)));
    EXPECT_EQ(checkpoint->dialect(), "hugging-face");
    std::vector<std::string> names;
    for (const TensorInfo& info : checkpoint->tensors()) names.push_back(info.name);
    EXPECT_THAT(names, ::testing::UnorderedElementsAreArray(expected)) << blocks;
  }
}

TEST(ContainerTest, NamesThatTrainersPutAroundAModelAreTakenOff) {
  const char* const kNames[][2] = {
      {"module.blocks.0.att.key.weight", "blocks.0.att.key.weight"},
      {"_orig_mod.module.emb.weight", "emb.weight"},
      {"module._orig_mod.head.weight", "head.weight"},
      {"blocks.0._orig_mod.ffn.key.weight", "blocks.0.ffn.key.weight"},
      {"_fsdp_wrapped_module.blocks.1._checkpoint_wrapped_module.ln1.weight", "blocks.1.ln1.weight"},
      {"base_model.model.blocks.2.ln1.weight", "blocks.2.ln1.weight"},
      {"_forward_module.ln_out.weight", "ln_out.weight"},
      {"model_of_mine.weight", "model_of_mine.weight"},
  };
  for (const auto& name : kNames) {
    for (const std::string& bytes :
         {testing::SafetensorsBytes({Bytes(name[0], {1})}), testing::TorchZipBytes({Bytes(name[0], {1})})}) {
      ASSERT_OK_AND_ASSIGN(const auto checkpoint, OpenBytes(bytes));
      EXPECT_EQ(checkpoint->tensors()[0].name, name[1]);
    }
  }
}

// ../shared/cases, when the data is there.
TEST(ContainerTest, SmallOddFilesHoldTheSameModel) {
  const char* const shared = std::getenv("RWKV_SHARED");
  if (shared == nullptr) GTEST_SKIP() << "RWKV_SHARED is not set";
  const std::string folder = absl::StrCat(shared, "/cases/");
  ASSERT_OK_AND_ASSIGN(const auto good, Checkpoint::Open(folder + "good.safetensors"));
  for (const char* name : {"metadata_null.safetensors", "entry_field.safetensors", "prefix_module.safetensors",
                           "prefix_orig_mod.safetensors", "sharded", "sharded/model.safetensors.index.json"}) {
    SCOPED_TRACE(name);
    ASSERT_OK_AND_ASSIGN(const auto other, Checkpoint::Open(folder + name));
    ASSERT_EQ(NamesAndShapes(*other), NamesAndShapes(*good));
    for (const TensorInfo& info : good->tensors()) {
      EXPECT_EQ(std::memcmp(good->Read(info.name)->data, other->Read(info.name)->data, info.bytes), 0) << info.name;
    }
  }
}

TEST(HuggingFaceDialectTest, PartsOfOtherShapesAreRefused) {
  const struct {
    const char* name;
    std::vector<int64_t> shape;
    const char* message;
  } kCases[] = {
      {"x_proj.0.linear.weight", {10}, "not one of 2 dimensions"},
      {"x_proj.0.linear.weight", {9, 2}, "dimension 1 is a multiple of 5"},
      {"x_proj.2.weight", {2, 9}, "dimension 1 is a multiple of 5"},
      {"x_proj.2.weight", {10}, "dimension 1 is a multiple of 5"},
      {"x_bias", {4, 2}, "not [5, 1, width]"},
      {"x_x", {5, 2}, "not [6, 1, width]"},
      {"w_lora.lora.0.weight", {4}, "not one of 2 dimensions"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(absl::StrCat(test.name, ShapeString(test.shape)));
    const std::string name = absl::StrCat("model.layers.0.attn.", test.name);
    EXPECT_THAT(OpenBytes(testing::SafetensorsBytes(std::vector<RawTensor>{Bytes(name, test.shape)})),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(test.message)));
  }
}

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
