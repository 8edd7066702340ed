#include "services/checkpoint/model_config.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/formats/element_type.h"
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
constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;

// The base row: 3 layers, D 32, H 2, N 16, F 48, V 11; small, because one test rewrites it for each of its tensors.
RandomModelOptions BaseOptions() {
  RandomModelOptions options;
  options.layers = 3;
  options.width = 32;
  options.head_size = 16;
  options.ffn_width = 48;
  options.vocab_size = 11;
  options.decay_rank = 5;
  options.iclr_rank = 6;
  options.value_residual_rank = 7;
  options.gate_rank = 40;
  return options;
}

std::vector<RawTensor> BaseModel() { return *testing::MakeRandomModel(BaseOptions()); }

absl::StatusOr<ModelConfig> ConfigOf(const std::vector<RawTensor>& tensors) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/model.safetensors");
  std::ofstream(path, std::ios::binary) << testing::SafetensorsBytes(tensors);
  const auto checkpoint = Checkpoint::Open(path);
  if (!checkpoint.ok()) return checkpoint.status();
  return ModelConfig::FromCheckpoint(**checkpoint);
}

RawTensor& Named(std::vector<RawTensor>* tensors, const std::string& name) {
  const auto found =
      std::find_if(tensors->begin(), tensors->end(), [&](const RawTensor& tensor) { return tensor.spec.name == name; });
  EXPECT_NE(found, tensors->end()) << name;
  return *found;
}

void Remove(std::vector<RawTensor>* tensors, const std::function<bool(const std::string&)>& is_unwanted) {
  const size_t before = tensors->size();
  tensors->erase(std::remove_if(tensors->begin(), tensors->end(),
                                [&](const RawTensor& tensor) { return is_unwanted(tensor.spec.name); }),
                 tensors->end());
  EXPECT_LT(tensors->size(), before);
}

void Reshape(RawTensor* tensor, std::vector<int64_t> shape) {
  tensor->spec.shape = std::move(shape);
  tensor->data.assign(testing::ElementsOf(tensor->spec) * ElementSize(tensor->spec.type), '\0');
}

RawTensor Zeros(const std::string& name, std::vector<int64_t> shape, ElementType type = ElementType::kBFloat16) {
  RawTensor tensor{{name, type, {}}, ""};
  Reshape(&tensor, std::move(shape));
  return tensor;
}

TEST(ModelConfigTest, ReadsEverySizeOffTheTensors) {
  ASSERT_OK_AND_ASSIGN(const ModelConfig config, ConfigOf(BaseModel()));
  EXPECT_EQ(config.version, 7);
  EXPECT_EQ(config.layer_count, 3);
  EXPECT_EQ(config.width, 32);
  EXPECT_EQ(config.attention_width, 32);
  EXPECT_EQ(config.head_count, 2);
  EXPECT_EQ(config.head_size, 16);
  EXPECT_EQ(config.ffn_width, 48);
  EXPECT_EQ(config.vocab_size, 11);
  ASSERT_EQ(config.ranks.size(), 3);
  EXPECT_EQ(config.ranks[0].value_residual, 0);
  for (int layer : {1, 2}) {
    EXPECT_EQ(config.ranks[layer].decay, 5);
    EXPECT_EQ(config.ranks[layer].iclr, 6);
    EXPECT_EQ(config.ranks[layer].value_residual, 7);
    EXPECT_EQ(config.ranks[layer].gate, 40);
    EXPECT_FALSE(config.has_initial_state[layer]);
  }
  EXPECT_FALSE(config.embedding_is_normalised);
  EXPECT_EQ(config.dtype, kernels::DType::kBFloat16);
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
       [](const ModelConfig& c) { EXPECT_EQ(c.ranks[0].value_residual, 0); }},
      {"a rank of its own in one layer",
       [](auto* t) {
         Reshape(&Named(t, "blocks.1.att.w1"), {32, 9});
         Reshape(&Named(t, "blocks.1.att.w2"), {9, 32});
       },
       [](const ModelConfig& c) {
         EXPECT_EQ(c.ranks[0].decay, 5);
         EXPECT_EQ(c.ranks[1].decay, 9);
       }},
      {"a rank as wide as the model",
       [](auto* t) {
         Reshape(&Named(t, "blocks.1.att.w1"), {32, 32});
         Reshape(&Named(t, "blocks.1.att.w2"), {32, 32});
       },
       [](const ModelConfig& c) { EXPECT_EQ(c.ranks[1].decay, 32); }},
      {"mixed types",
       [](auto* t) {
         RawTensor& x = Named(t, "blocks.1.att.w0");
         x.spec.type = ElementType::kFloat32;
         Reshape(&x, {1, 1, 32});
       },
       [](const ModelConfig& c) { EXPECT_EQ(c.dtype, kernels::DType::kBFloat16); }},
      {"a tuned state in one layer",
       [](auto* t) {
         t->push_back(Zeros("blocks.1.att.time_state", {2, 16, 16}));
       },
       [](const ModelConfig& c) {
         EXPECT_FALSE(c.has_initial_state[0]);
         EXPECT_TRUE(c.has_initial_state[1]);
       }},
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
  EXPECT_EQ(config.dtype, kernels::DType::kFloat16);
}

// Every tensor in turn: gone, of another shape, of a type that is no weight's.
TEST(ModelConfigTest, EveryTensorIsNeededInItsShapeAndType) {
  const std::vector<RawTensor> base = BaseModel();
  ASSERT_OK(ConfigOf(base));
  for (size_t i = 0; i < base.size(); ++i) {
    const std::string& name = base[i].spec.name;
    SCOPED_TRACE(name);
    std::vector<RawTensor> gone = base;
    gone.erase(gone.begin() + i);
    EXPECT_THAT(ConfigOf(gone), StatusIs(kInvalid, HasSubstr(absl::StrCat("\"", name, "\" is missing"))));

    // The sizes that emb, r_k and ffn.key decide make other tensors look wrong.
    const bool decides_sizes = name == "emb.weight" || name == "blocks.0.att.r_k" || name == "blocks.0.ffn.key.weight";
    std::vector<RawTensor> larger = base;
    std::vector<int64_t> shape = base[i].spec.shape;
    ++shape.back();
    Reshape(&larger[i], shape);
    EXPECT_THAT(ConfigOf(larger), StatusIs(kInvalid, HasSubstr("has shape")));
    if (!decides_sizes && !absl::EndsWith(name, "1")) {  // A wider w1 makes w2 wrong.
      EXPECT_THAT(ConfigOf(larger), StatusIs(kInvalid, HasSubstr(absl::StrCat("\"", name, "\" has shape"))));
    }

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

TEST(ModelConfigTest, RefusesTensorsThatDoNotBelong) {
  const struct {
    const char* name;
    std::function<void(std::vector<RawTensor>*)> change;
    absl::StatusCode code;
    const char* message;
  } kCases[] = {
      {"an unknown tensor", [](auto* t) { t->push_back(Zeros("blocks.1.att.surprise", {1})); }, kInvalid,
       "\"blocks.1.att.surprise\""},
      {"an unknown global", [](auto* t) { t->push_back(Zeros("tail.weight", {1})); }, kInvalid, "\"tail.weight\""},
      {"ln0 in layer 1", [](auto* t) { t->push_back(Zeros("blocks.1.ln0.weight", {32})); }, kInvalid,
       "\"blocks.1.ln0.weight\""},
      {"half of ln0", [](auto* t) { Remove(t, [](const std::string& n) { return n == "blocks.0.ln0.bias"; }); },
       kInvalid, "blocks.0.ln0.bias"},
      {"a layer without most of its tensors", [](auto* t) { t->push_back(Zeros("blocks.3.ln1.weight", {32})); },
       kInvalid, "\"blocks.3."},
      {"a layer far above", [](auto* t) { t->push_back(Zeros("blocks.999999.ln1.weight", {32})); }, kInvalid,
       "layer 3 is missing"},
      {"a hole in the numbering",
       [](auto* t) {
         for (RawTensor& x : *t)
           if (absl::StartsWith(x.spec.name, "blocks.1.")) x.spec.name[7] = '7';
       },
       kInvalid, "layer 1 is missing"},
      {"a layer left out",
       [](auto* t) { Remove(t, [](const std::string& n) { return absl::StartsWith(n, "blocks.1."); }); }, kInvalid,
       "layer 1 is missing"},
      {"layer 0 left out",
       [](auto* t) { Remove(t, [](const std::string& n) { return absl::StartsWith(n, "blocks.0."); }); }, kInvalid,
       "layer 0 is missing"},
      {"a layer number with a zero before it", [](auto* t) { t->push_back(Zeros("blocks.01.ln1.weight", {32})); },
       kInvalid, "\"blocks.01.ln1.weight\""},
      {"a negative layer", [](auto* t) { t->push_back(Zeros("blocks.-1.ln1.weight", {32})); }, kInvalid,
       "\"blocks.-1.ln1.weight\""},
      {"a layer number beyond int",
       [](auto* t) { t->push_back(Zeros("blocks.99999999999999999999.ln1.weight", {32})); }, kInvalid,
       "99999999999999999999"},
      {"a block without number", [](auto* t) { t->push_back(Zeros("blocks.", {32})); }, kInvalid, "\"blocks.\""},
      {"a tuned state of another shape",
       [](auto* t) {
         t->push_back(Zeros("blocks.1.att.time_state", {2, 16, 15}));
       },
       kInvalid, "\"blocks.1.att.time_state\" has shape"},
      {"head.bias", [](auto* t) { t->push_back(Zeros("head.bias", {11})); }, kUnimplemented, "head.bias is recognised"},
      {"a head of another vocabulary",
       [](auto* t) {
         Reshape(&Named(t, "head.weight"), {12, 32});
       },
       kInvalid, "\"head.weight\" has shape [12, 32]"},
      {"heads that do not fill the width",
       [](auto* t) {
         for (int i = 0; i < 3; ++i) Reshape(&Named(t, absl::StrCat("blocks.", i, ".att.r_k")), {3, 16});
       },
       kInvalid, "blocks.0.att.w0"},
      {"a flattened r_k", [](auto* t) { Reshape(&Named(t, "blocks.0.att.r_k"), {32}); }, kInvalid,
       "\"blocks.0.att.r_k\" has shape [32]"},
      {"DeepEmbed",
       [](auto* t) {
         t->push_back(Zeros("blocks.0.ffn.s_emb.weight", {11, 1024}));
       },
       kUnimplemented, "RWKV-7a"},
      {"DeepEmbed with attention",
       [](auto* t) {
         t->push_back(Zeros("blocks.0.ffn.s_emb.weight", {11, 1024}));
         t->push_back(Zeros("blocks.0.qkv.qq.weight", {256, 32}));
       },
       kUnimplemented, "RWKV-7b"},
      {"the RWKV-8 experiment",
       [](auto* t) {
         t->push_back(Zeros("blocks.0.ffn.enn.weight", {11, 32}));
       },
       kUnimplemented, "RWKV-8"},
      {"LoRA leftovers",
       [](auto* t) {
         t->push_back(Zeros("blocks.0.att.key.lora_A", {4, 32}));
       },
       kUnimplemented, "adapters"},
      {"web-rwkv's dialect",
       [](auto* t) {
         Reshape(&Named(t, "blocks.0.att.w1"), {5, 32});
       },
       kUnimplemented, "web-rwkv"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    std::vector<RawTensor> tensors = BaseModel();
    test.change(&tensors);
    EXPECT_THAT(ConfigOf(tensors),
                StatusIs(test.code, testing::AllOf(HasSubstr(test.message), HasSubstr("model.safetensors: "))));
  }
}

TEST(ModelConfigTest, OtherVersionsAreRecognised) {
  const auto with = [](std::vector<std::string> names) {
    std::vector<RawTensor> tensors = {Zeros("emb.weight", {11, 32}), Zeros("blocks.0.ln0.weight", {32})};
    for (const std::string& name : names) tensors.push_back(Zeros(absl::StrCat("blocks.0.att.", name), {32}));
    return tensors;
  };
  std::vector<RawTensor> five_two = with({"ln_x.weight"});
  five_two.push_back(Zeros("blocks.0.att.time_decay", {2, 16}));
  const struct {
    const char* name;
    std::vector<RawTensor> tensors;
    absl::StatusCode code;
    const char* message;
  } kCases[] = {
      {"6", with({"time_maa_x", "time_maa_w1", "ln_x.weight"}), kUnimplemented,
       "RWKV-6 (x060) is recognised, but this build serves RWKV-7 only"},
      {"6, experimental", with({"time_maa_x", "time_maa_rkvw_w1"}), kUnimplemented, "x060a/b/c"},
      {"5.2", five_two, kUnimplemented, "RWKV-5.2 is recognised"},
      {"5.1", with({"ln_x.weight", "gate.weight", "time_decay"}), kUnimplemented, "RWKV-5.1 is recognised"},
      {"5.0", with({"ln_x.weight", "time_decay"}), kUnimplemented, "RWKV-5.0 is recognised"},
      {"4", with({"time_mix_v", "time_decay"}), kUnimplemented, "RWKV-4 is recognised"},
      {"2", with({"time_mix"}), kUnimplemented, "RWKV-2 is recognised"},
      {"blocks of something else", with({"q_proj.weight"}), kInvalid, "no RWKV model that is known"},
      {"names of something else",
       {Zeros("model.layers.0.self_attn.q_proj.weight", {32, 32})},
       kInvalid,
       "\"layers.0.self_attn.q_proj.weight\""},
      {"no tensors", {}, kInvalid, "holds no tensor"},
      {"tuned states alone", {Zeros("blocks.0.att.time_state", {2, 16, 16})}, kInvalid, "merge them"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    EXPECT_THAT(ConfigOf(test.tensors), StatusIs(test.code, HasSubstr(test.message)));
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
    int layers;
    int64_t width, heads, ffn, vocab;
    kernels::DType dtype;
  } kServed[] = {
      {"tiny-7v0.safetensors", 12, 64, 1, 256, 256, kernels::DType::kBFloat16},
      {"rand-7.safetensors", 2, 128, 2, 512, 101, kernels::DType::kBFloat16},
      {"rand-7-pth.pth", 3, 64, 2, 256, 101, kernels::DType::kBFloat16},
      {"rand-7-time_state.safetensors", 2, 64, 2, 256, 101, kernels::DType::kBFloat16},
      {"reverse-v7.safetensors", 2, 64, 4, 128, 12, kernels::DType::kFloat32},
  };
  for (const auto& test : kServed) {
    SCOPED_TRACE(test.file);
    const absl::StatusOr<ModelConfig> config = config_of(test.file);
    ASSERT_OK(config);
    EXPECT_EQ(config->layer_count, test.layers);
    EXPECT_EQ(config->width, test.width);
    EXPECT_EQ(config->head_count, test.heads);
    EXPECT_EQ(config->head_size * test.heads, test.width);
    EXPECT_EQ(config->ffn_width, test.ffn);
    EXPECT_EQ(config->vocab_size, test.vocab);
    EXPECT_EQ(config->dtype, test.dtype);
    for (int layer = 0; layer < config->layer_count; ++layer) {
      EXPECT_EQ(config->has_initial_state[layer], absl::StrContains(test.file, "time_state"));
    }
  }
  const struct {
    const char* file;
    absl::StatusCode code;
    const char* message;
  } kRefused[] = {
      {"tiny-4v0.safetensors", kUnimplemented, "RWKV-4 is"},
      {"tiny-5v2.safetensors", kUnimplemented, "RWKV-5.2 is"},
      {"tiny-6v0-f16.safetensors", kUnimplemented, "RWKV-6 (x060) is"},
      {"rand-4.safetensors", kUnimplemented, "RWKV-4 is"},
      {"rand-4-torch-legacy.pth", kUnimplemented, "RWKV-4 is"},
      {"rand-5.0.safetensors", kUnimplemented, "RWKV-5.0 is"},
      {"rand-5.1.safetensors", kUnimplemented, "RWKV-5.1 is"},
      {"rand-5.2.safetensors", kUnimplemented, "RWKV-5.2 is"},
      {"rand-6.safetensors", kUnimplemented, "RWKV-6 (x060) is"},
      {"rand-6-time_state.safetensors", kUnimplemented, "RWKV-6 (x060) is"},
      {"rand-6-torch-zip.pth", kUnimplemented, "RWKV-6 (x060) is"},
      {"rand-7a.safetensors", kUnimplemented, "RWKV-7a"},
      {"rand-7b.safetensors", kUnimplemented, "RWKV-7b"},
      {"260123_reverse_L2_only_rwkv7.pth", kInvalid, "is no RWKV model with the original names"},
  };
  for (const auto& test : kRefused) {
    SCOPED_TRACE(test.file);
    EXPECT_THAT(config_of(test.file), StatusIs(test.code, HasSubstr(test.message)));
  }
}

}  // namespace
}  // namespace rwkv::checkpoint
