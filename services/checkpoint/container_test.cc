// Every container and dialect against the same model with its original names.
#include "services/checkpoint/container.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/container_testing.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/formats/tensor_record.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::checkpoint {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::RawTensor;
using testing::StatusIs;

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

}  // namespace
}  // namespace rwkv::checkpoint
