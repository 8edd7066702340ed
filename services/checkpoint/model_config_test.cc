#include "services/checkpoint/model_config.h"

#include <cstdlib>
#include <functional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/model_tensors.h"
#include "services/checkpoint/testing/changed_models.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::checkpoint {
namespace {

using testing::HasSubstr;
using testing::RandomModelOptions;
using testing::RawTensor;
using testing::StatusIs;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;

TEST(ModelConfigTest, ReadsEverySizeOffTheTensors) {
  ASSERT_OK_AND_ASSIGN(const ModelConfig config, ConfigOf(BaseModel()));
  EXPECT_EQ(config.version, ModelVersion::k7);
  EXPECT_EQ(config.layer_count, 3);
  EXPECT_EQ(config.width, 32);
  EXPECT_EQ(config.attention_width, 32);
  EXPECT_EQ(config.head_count, 2);
  EXPECT_EQ(config.head_size, 16);
  EXPECT_EQ(config.ffn_width, 48);
  EXPECT_EQ(config.vocab_size, 11);
  ASSERT_EQ(config.layer_sizes.size(), 3);
  EXPECT_EQ(config.layer_sizes[0][Size::kValueResidualRank], 0);
  for (int layer : {1, 2}) {
    EXPECT_EQ(config.layer_sizes[layer][Size::kDecayRank], 5);
    EXPECT_EQ(config.layer_sizes[layer][Size::kIclrRank], 6);
    EXPECT_EQ(config.layer_sizes[layer][Size::kValueResidualRank], 7);
    EXPECT_EQ(config.layer_sizes[layer][Size::kGateRank], 40);
  }
  EXPECT_FALSE(config.has_initial_state);
  EXPECT_FALSE(config.embedding_is_normalised);
  EXPECT_EQ(config.dtype, "bf16");
}

// shared/spec, rwkv.md 13: 2VD + 4D + L(12D^2 + 19D + 2D(Rw+Ra+Rv+Rg)), less D + 2D Rv for block 0, with F = 4D.
TEST(ModelConfigTest, CountsParametersAsTheSpecificationDoes) {
  RandomModelOptions options = BaseOptions();
  options.ffn_width = 128;
  ASSERT_OK_AND_ASSIGN(const ModelConfig config, ConfigOf(*testing::MakeRandomModel(options)));
  const int64_t L = 3, D = 32, V = 11, ranks = 5 + 6 + 7 + 40;
  EXPECT_EQ(config.parameters, 2 * V * D + 4 * D + L * (12 * D * D + 19 * D + 2 * D * ranks) - (D + 2 * D * 7));
}

TEST(ModelConfigTest, AcceptsWhatRealFilesDo) {
  const struct {
    const char* name;
    std::function<void(std::vector<RawTensor>*)> change;
    std::function<void(const ModelConfig&)> expect;
  } kCases[] = {
      {"flat vectors",
       [](auto* t) {
         for (RawTensor& x : *t)
           if (x.spec.shape.size() == 3) x.spec.shape = {32};
       },
       [](const auto&) {}},
      {"[1, D] vectors",
       [](auto* t) {
         for (RawTensor& x : *t)
           if (x.spec.shape.size() == 3) x.spec.shape = {1, 32};
       },
       [](const auto&) {}},
      {"an embedding that is normalised already",
       [](auto* t) { Remove(t, [](const std::string& n) { return absl::StrContains(n, "ln0"); }); },
       [](const ModelConfig& c) { EXPECT_TRUE(c.embedding_is_normalised); }},
      {"dummies in layer 0",
       [](auto* t) {
         t->push_back(Zeros("blocks.0.att.v0", {1, 1, 32}));
         t->push_back(Zeros("blocks.0.att.v1", {3, 3}));
         t->push_back(Zeros("blocks.0.att.v2", {9}, ElementType::kFloat64));
       },
       [](const ModelConfig& c) { EXPECT_EQ(c.layer_sizes[0][Size::kValueResidualRank], 0); }},
      {"a rank of its own in one layer",
       [](auto* t) {
         Reshape(&Named(t, "blocks.1.att.w1"), {32, 9});
         Reshape(&Named(t, "blocks.1.att.w2"), {9, 32});
       },
       [](const ModelConfig& c) {
         EXPECT_EQ(c.layer_sizes[0][Size::kDecayRank], 5);
         EXPECT_EQ(c.layer_sizes[1][Size::kDecayRank], 9);
       }},
      {"a rank as wide as the model",
       [](auto* t) {
         Reshape(&Named(t, "blocks.1.att.w1"), {32, 32});
         Reshape(&Named(t, "blocks.1.att.w2"), {32, 32});
       },
       [](const ModelConfig& c) { EXPECT_EQ(c.layer_sizes[1][Size::kDecayRank], 32); }},
      {"mixed types",
       [](auto* t) {
         RawTensor& x = Named(t, "blocks.1.att.w0");
         x.spec.type = ElementType::kFloat32;
         Reshape(&x, {1, 1, 32});
       },
       [](const ModelConfig& c) { EXPECT_EQ(c.dtype, "bf16"); }},
      {"a tuned state in one layer",
       [](auto* t) {
         t->push_back(Zeros("blocks.1.att.time_state", {2, 16, 16}));
       },
       [](const ModelConfig& c) { EXPECT_TRUE(c.has_initial_state); }},
      {"a trainer's prefix",
       [](auto* t) {
         for (RawTensor& x : *t) x.spec.name = absl::StrCat("model.", x.spec.name);
       },
       [](const auto&) {}},
      {"any order", [](auto* t) { std::reverse(t->begin(), t->end()); }, [](const auto&) {}},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    std::vector<RawTensor> tensors = BaseModel();
    test.change(&tensors);
    const absl::StatusOr<ModelConfig> config = ConfigOf(tensors);
    ASSERT_OK(config);
    EXPECT_EQ(config->layer_count, 3);
    test.expect(*config);
  }
}

TEST(ModelConfigTest, ReadsOddButLegalShapes) {
  RandomModelOptions options;
  options.attention_width = 96;  // A != D
  options.width = 40;
  options.head_size = 12;
  options.ffn_width = 7;
  options.vocab_size = 1;
  options.layers = 1;
  options.decay_rank = options.iclr_rank = options.gate_rank = 1;
  options.dtype = kernels::DType::kFloat16;
  ASSERT_OK_AND_ASSIGN(const ModelConfig config, ConfigOf(*testing::MakeRandomModel(options)));
  EXPECT_EQ(config.attention_width, 96);
  EXPECT_EQ(config.width, 40);
  EXPECT_EQ(config.head_count, 8);
  EXPECT_EQ(config.dtype, "fp16");
}

class EveryVersionTest : public ::testing::TestWithParam<ModelVersion> {};

INSTANTIATE_TEST_SUITE_P(Versions, EveryVersionTest, ::testing::ValuesIn(kModelVersions), [](const auto& info) {
  return absl::StrReplaceAll(absl::StrCat("Rwkv", Name(info.param)), {{".", "_"}});
});

TEST_P(EveryVersionTest, IsToldByItsTensors) {
  ASSERT_OK_AND_ASSIGN(const ModelConfig config, ConfigOf(*testing::MakeRandomModel(BaseOptions(GetParam()))));
  EXPECT_EQ(config.version, GetParam());
  EXPECT_EQ(config.layer_count, 3);
  EXPECT_EQ(config.width, 32);
  EXPECT_EQ(config.attention_width, 32);
  EXPECT_EQ(config.head_count, GetParam() == ModelVersion::k4 ? 0 : 2);
  EXPECT_EQ(config.head_size, GetParam() == ModelVersion::k4 ? 0 : 16);
  EXPECT_EQ(config.ffn_width, 48);
  EXPECT_EQ(config.vocab_size, 11);
}

// Every tensor in turn: gone, of another shape, of a type that is no weight's.
TEST_P(EveryVersionTest, EveryTensorIsNeededInItsShapeAndType) {
  RandomModelOptions options = BaseOptions(GetParam());
  options.layers = 2;
  const std::vector<RawTensor> base = *testing::MakeRandomModel(options);
  ASSERT_OK(ConfigOf(base));
  // A size that one tensor decides makes others look wrong.
  std::set<std::string> decides = {"ln_out.weight"};
  for (int layer = 0; layer < 2; ++layer) {
    for (const char* name : {"att.time_decay_w1", "att.w1", "att.a1", "att.v1", "att.g1", "ffn.s1", "qkv.k1"}) {
      decides.insert(absl::StrCat("blocks.", layer, ".", name));
    }
  }
  for (size_t i = 0; i < base.size(); ++i) {
    const std::string& name = base[i].spec.name;
    SCOPED_TRACE(name);
    std::vector<RawTensor> gone = base;
    gone.erase(gone.begin() + i);
    if (name == "head.weight") {  // Then the head is the embedding.
      EXPECT_OK(ConfigOf(gone));
      gone.clear();
    }
    const bool has_alternative = absl::EndsWith(name, ".att.time_first") && GetParam() == ModelVersion::k5_0;
    if (!gone.empty()) {
      EXPECT_THAT(ConfigOf(gone),
                  StatusIs(kInvalid, HasSubstr(has_alternative ? "time_faaaa\" is missing"
                                                               : absl::StrCat("\"", name, "\" is missing"))));
    }

    std::vector<RawTensor> larger = base;
    std::vector<int64_t> shape = base[i].spec.shape;
    ++shape.back();
    Reshape(&larger[i], shape);
    EXPECT_THAT(ConfigOf(larger),
                StatusIs(kInvalid, HasSubstr(decides.count(name) > 0 ? std::string("has shape")
                                                                     : absl::StrCat("\"", name, "\" has shape"))));

    std::vector<RawTensor> flat = base;
    Reshape(&flat[i], {});
    EXPECT_THAT(ConfigOf(flat), StatusIs(kInvalid, HasSubstr(absl::StrCat("\"", name, "\" has shape []"))));

    std::vector<RawTensor> none = base;
    Reshape(&none[i], {0, 0});
    EXPECT_THAT(ConfigOf(none), StatusIs(kInvalid, HasSubstr(absl::StrCat("\"", name, "\" has shape [0, 0]"))));

    std::vector<RawTensor> retyped = base;
    retyped[i].spec.type = ElementType::kInt32;
    Reshape(&retyped[i], base[i].spec.shape);
    EXPECT_THAT(ConfigOf(retyped), StatusIs(kInvalid, HasSubstr(absl::StrCat("\"", name, "\" is int32"))));
  }
}

TEST_P(EveryVersionTest, ATensorThatDoesNotBelongIsRefused) {
  for (const char* name : {"blocks.1.att.surprise", "blocks.1.ln0.weight", "tail.weight"}) {
    std::vector<RawTensor> tensors = *testing::MakeRandomModel(BaseOptions(GetParam()));
    tensors.push_back(Zeros(name, {32}));
    EXPECT_THAT(ConfigOf(tensors),
                StatusIs(kInvalid, HasSubstr(absl::StrCat("\"", name, "\" of shape [32] is not part of an RWKV-",
                                                          Name(GetParam())))));
  }
}

// X becomes int8 with X.scale, or two to a byte with X.scale and X.min.
void Quantize(std::vector<RawTensor>* tensors, const std::string& name, bool is_int4, int64_t group) {
  const std::vector<int64_t> shape = Named(tensors, name).spec.shape;
  const int64_t groups = (shape[1] + group - 1) / group;
  RawTensor& matrix = Named(tensors, name);
  matrix = Zeros(name, {shape[0], is_int4 ? (shape[1] + 1) / 2 : shape[1]},
                 is_int4 ? ElementType::kUint8 : ElementType::kInt8);
  tensors->push_back(Zeros(absl::StrCat(name, ".scale"), {shape[0], groups}, ElementType::kFloat16));
  if (is_int4) tensors->push_back(Zeros(absl::StrCat(name, ".min"), {shape[0], groups}, ElementType::kFloat16));
}

TEST(ModelConfigTest, MatricesMayBeQuantized) {
  RandomModelOptions options = BaseOptions();
  options.ffn_width = 97;
  ASSERT_OK_AND_ASSIGN(const ModelConfig plain, ConfigOf(*testing::MakeRandomModel(options)));
  for (bool is_int4 : {false, true}) {
    for (int64_t group : {32, 64}) {
      std::vector<RawTensor> tensors = *testing::MakeRandomModel(options);
      std::vector<std::string> names;
      for (const RawTensor& tensor : tensors) {
        if (tensor.spec.shape.size() == 2 && absl::EndsWith(tensor.spec.name, ".weight")) {
          names.push_back(tensor.spec.name);
        }
      }
      for (const std::string& name : names) Quantize(&tensors, name, is_int4, group);
      ASSERT_OK_AND_ASSIGN(const ModelConfig config, ConfigOf(tensors));
      EXPECT_EQ(config.dtype, is_int4 ? "int4" : "int8");
      EXPECT_EQ(config.parameters, plain.parameters);
      EXPECT_EQ(config.width, 32);
      EXPECT_EQ(config.ffn_width, 97);

      const std::string value = "blocks.1.ffn.value.weight";
      for (const std::string& part : {value + ".scale", is_int4 ? value + ".min" : value + ".scale"}) {
        std::vector<RawTensor> wrong = tensors;
        Remove(&wrong, [&](const std::string& name) { return name == part; });
        EXPECT_THAT(ConfigOf(wrong), StatusIs(kInvalid, HasSubstr(absl::StrCat("\"", part, "\" is missing"))));
        wrong = tensors;
        Reshape(&Named(&wrong, part), {32, 7});
        EXPECT_THAT(ConfigOf(wrong), StatusIs(kInvalid, HasSubstr(absl::StrCat("\"", part, "\" is fp16 [32, 7]"))));
        wrong = tensors;
        Named(&wrong, part).spec.type = ElementType::kBFloat16;
        EXPECT_THAT(ConfigOf(wrong), StatusIs(kInvalid, HasSubstr(absl::StrCat("\"", part, "\" is bf16"))));
      }
    }
  }
}

TEST(ModelConfigTest, OnlyMatricesMayBeQuantized) {
  for (const char* name : {"blocks.0.att.w1", "blocks.1.att.r_k"}) {
    std::vector<RawTensor> tensors = BaseModel();
    Quantize(&tensors, name, false, 64);
    EXPECT_THAT(ConfigOf(tensors), StatusIs(kInvalid, HasSubstr(absl::StrCat("\"", name, "\" is int8"))));
  }
}

// Models published with the specification; they are not part of this repository.
TEST(ModelConfigTest, PublishedModelsOpenOrAreRefused) {
  const char* shared = std::getenv("RWKV_SHARED");
  if (shared == nullptr) GTEST_SKIP() << "RWKV_SHARED is not set";
  const auto config_of = [shared](const char* file) -> absl::StatusOr<ModelConfig> {
    const auto checkpoint = Checkpoint::Open(absl::StrCat(shared, "/data/models/", file));
    return checkpoint.ok() ? ModelConfig::FromCheckpoint(**checkpoint) : checkpoint.status();
  };
  const struct {
    const char* file;
    ModelVersion version;
    int layers;
    int64_t width, heads, ffn, vocab;
    const char* dtype;
  } kServed[] = {
      {"tiny-4v0.safetensors", ModelVersion::k4, 4, 128, 0, 256, 256, "fp32"},
      {"tiny-5v2.safetensors", ModelVersion::k5_2, 12, 64, 8, 256, 256, "fp32"},
      {"tiny-6v0-f16.safetensors", ModelVersion::k6, 12, 128, 16, 448, 256, "fp16"},
      {"tiny-7v0.safetensors", ModelVersion::k7, 12, 64, 1, 256, 256, "bf16"},
      {"rand-7.safetensors", ModelVersion::k7, 2, 128, 2, 512, 101, "bf16"},
      {"rand-7-pth.pth", ModelVersion::k7, 3, 64, 2, 256, 101, "bf16"},
      {"rand-7-time_state.safetensors", ModelVersion::k7, 2, 64, 2, 256, 101, "bf16"},
      {"reverse-v7.safetensors", ModelVersion::k7, 2, 64, 4, 128, 12, "fp32"},
  };
  for (const auto& test : kServed) {
    SCOPED_TRACE(test.file);
    const absl::StatusOr<ModelConfig> config = config_of(test.file);
    ASSERT_OK(config);
    EXPECT_EQ(config->version, test.version);
    EXPECT_EQ(config->layer_count, test.layers);
    EXPECT_EQ(config->width, test.width);
    EXPECT_EQ(config->head_count, test.heads);
    if (test.heads != 0) EXPECT_EQ(config->head_size * test.heads, test.width);
    EXPECT_EQ(config->ffn_width, test.ffn);
    EXPECT_EQ(config->vocab_size, test.vocab);
    EXPECT_EQ(config->dtype, test.dtype);
    EXPECT_EQ(config->has_initial_state, absl::StrContains(test.file, "time_state"));
  }
  const std::pair<const char*, ModelVersion> kVersions[] = {
      {"rand-4.safetensors", ModelVersion::k4},
      {"rand-4-torch-legacy.pth", ModelVersion::k4},
      {"rand-5.0.safetensors", ModelVersion::k5_0},
      {"rand-5.1.safetensors", ModelVersion::k5_1},
      {"rand-5.2.safetensors", ModelVersion::k5_2},
      {"rand-6.safetensors", ModelVersion::k6},
      {"rand-6-time_state.safetensors", ModelVersion::k6},
      {"rand-6-torch-zip.pth", ModelVersion::k6},
      {"rand-7a.safetensors", ModelVersion::k7a},
      {"rand-7b.safetensors", ModelVersion::k7b},
  };
  for (const auto& [file, version] : kVersions) {
    SCOPED_TRACE(file);
    const absl::StatusOr<ModelConfig> config = config_of(file);
    ASSERT_OK(config);
    EXPECT_EQ(config->version, version);
  }
  EXPECT_THAT(config_of("260123_reverse_L2_only_rwkv7.pth"),
              StatusIs(kInvalid, HasSubstr("is no RWKV model with the original names")));
}

}  // namespace
}  // namespace rwkv::checkpoint
