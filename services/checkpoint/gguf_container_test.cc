// GGUF files: blocks, the vocabulary that they bring, and what is no RWKV.
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/container_testing.h"
#include "services/checkpoint/formats/element_type.h"
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
using testing::StatusIs;

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

}  // namespace
}  // namespace rwkv::checkpoint
