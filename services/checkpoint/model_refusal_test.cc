// Which tensors are no model that is served, and what is said of them.
#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/model_config.h"
#include "services/checkpoint/model_tensors.h"
#include "services/checkpoint/testing/changed_models.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::checkpoint {
namespace {

using testing::HasSubstr;
using testing::RawTensor;
using testing::StatusIs;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;

TEST(ModelRefusalTest, RefusesTensorsThatDoNotBelong) {
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
       kInvalid, "\"blocks.0.att.r_k\" has shape [3, 16]"},
      {"a flattened r_k", [](auto* t) { Reshape(&Named(t, "blocks.0.att.r_k"), {32}); }, kInvalid,
       "\"blocks.0.att.r_k\" has shape [32]"},
      {"a DeepEmbed table without the rest",
       [](auto* t) {
         t->push_back(Zeros("blocks.0.ffn.s_emb.weight", {11, 1024}));
       },
       kInvalid, "\"blocks.0.ffn.s1\" is missing"},
      {"the RWKV-8 experiment",
       [](auto* t) {
         t->push_back(Zeros("blocks.0.ffn.enn.weight", {11, 32}));
       },
       kUnimplemented, "RWKV-8"},
      {"LoRA leftovers",
       [](auto* t) {
         t->push_back(Zeros("blocks.0.att.key.lora_A", {4, 32}));
       },
       kUnimplemented, "an adapter"},
      {"one tensor in web-rwkv's dialect",
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

TEST(ModelRefusalTest, WhatIsNotServedIsRecognised) {
  const auto with = [](std::vector<std::string> names) {
    std::vector<RawTensor> tensors = {Zeros("emb.weight", {11, 32}), Zeros("blocks.0.ln0.weight", {32})};
    for (const std::string& name : names) tensors.push_back(Zeros(absl::StrCat("blocks.0.", name), {32}));
    return tensors;
  };
  std::vector<RawTensor> three = with({"att.time_mix_k", "att.time_mix_v"});
  three.push_back(Zeros("blocks.0.att.time_decay", {32, 1}));
  std::vector<RawTensor> copying = with({"att.time_mix_k", "att.time_mix_v", "att.time_decay"});
  copying.push_back(Zeros("head_q.weight", {256, 32}));
  const struct {
    const char* name;
    std::vector<RawTensor> tensors;
    absl::StatusCode code;
    const char* message;
  } kCases[] = {
      {"6, experimental", with({"att.time_maa_x", "att.time_maa_rkvw_w1"}), kUnimplemented,
       "RWKV-6 (an x060a/b/c experiment) is recognised, but not supported"},
      {"6, low-rank gate", with({"att.time_maa_x", "att.gate_w1"}), kUnimplemented, "x060a/b/c"},
      {"6, MishGLU", with({"att.time_maa_x", "ffn.aa.weight"}), kUnimplemented, "MishGLU"},
      {"4, ffnPre", with({"ffnPre.key.weight", "att.time_mix_v"}), kUnimplemented, "ffnPre"},
      {"3", three, kUnimplemented, "RWKV-3 is recognised"},
      {"3 or 4 that copies", copying, kUnimplemented, "head_q"},
      {"2", with({"att.time_mix"}), kUnimplemented, "RWKV-2 is recognised"},
      {"1", with({"attn.time_w"}), kUnimplemented, "RWKV-1 is recognised"},
      {"8", with({"rosa.q.weight"}), kUnimplemented, "RWKV-8 (ROSA) is recognised"},
      {"blocks of something else", with({"att.q_proj.weight"}), kInvalid, "no RWKV model that is known"},
      {"names of something else",
       {Zeros("model.layers.0.self_attn.q_proj.weight", {32, 32})},
       kInvalid,
       "\"layers.0.self_attn.q_proj.weight\""},
      {"no tensors", {}, kInvalid, "holds no tensor"},
      {"tuned states alone", {Zeros("blocks.0.att.time_state", {2, 16, 16})}, kInvalid, "--initial_states"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    EXPECT_THAT(ConfigOf(test.tensors), StatusIs(test.code, HasSubstr(test.message)));
  }
}

// Names and shapes of BlinkDL/RWKV-LM RWKV-v1/src/model.py, RWKV-v2-RNN/src/model.py and RWKV-v3/src/model.py.
TEST(ModelRefusalTest, TheFirstThreeVersionsAreRecognised) {
  const auto layer = [](std::vector<RawTensor>* t, const std::string& stem, std::vector<std::string> matrices) {
    for (const std::string& name : matrices) t->push_back(Zeros(absl::StrCat("blocks.0.", stem, name), {32, 32}));
  };
  const auto norms = [](std::vector<RawTensor>* t, std::vector<std::string> names) {
    for (const std::string& name : names) {
      t->push_back(Zeros(absl::StrCat(name, ".weight"), {32}));
      t->push_back(Zeros(absl::StrCat(name, ".bias"), {32}));
    }
  };
  std::vector<RawTensor> one = {Zeros("tok_emb.weight", {11, 32}),
                                Zeros("head.weight", {11, 32}),
                                Zeros("time_out", {1, 64, 1}),
                                Zeros("head_q.weight", {256, 32}),
                                Zeros("head_q.bias", {256}),
                                Zeros("head_k.weight", {256, 32}),
                                Zeros("head_k.bias", {256}),
                                Zeros("copy_mask", {64, 64}),
                                Zeros("blocks.0.attn.time_w", {2, 64}),
                                Zeros("blocks.0.attn.time_alpha", {2, 1, 64}),
                                Zeros("blocks.0.attn.time_beta", {2, 64, 1}),
                                Zeros("blocks.0.attn.time_gamma", {64, 1})};
  layer(&one, "attn.", {"key.weight", "value.weight", "receptance.weight", "output.weight"});
  layer(&one, "mlp.", {"key.weight", "value.weight", "weight.weight", "receptance.weight"});
  norms(&one, {"blocks.0.ln1", "blocks.0.ln2", "ln_f"});

  std::vector<RawTensor> two = {Zeros("emb.weight", {11, 32}),
                                Zeros("head.weight", {11, 32}),
                                Zeros("blocks.0.att.time_decay", {32, 1}),
                                Zeros("blocks.0.att.time_first", {32, 1}),
                                Zeros("blocks.0.att.time_mix", {1, 1, 32}),
                                Zeros("blocks.0.ffn.time_mix", {1, 1, 32})};
  layer(&two, "att.", {"key.weight", "value.weight", "receptance.weight", "output.weight"});
  layer(&two, "ffn.", {"key.weight", "receptance.weight", "value.weight"});
  norms(&two, {"blocks.0.ln1", "blocks.0.ln2", "ln_out"});
  std::vector<RawTensor> two_that_copies = two;
  two_that_copies.push_back(Zeros("head_q.weight", {256, 32}));
  two_that_copies.push_back(Zeros("head_k.weight", {256, 32}));
  two_that_copies.push_back(Zeros("copy_mask", {64, 64}));

  std::vector<RawTensor> three = {
      Zeros("emb.weight", {11, 32}),
      Zeros("head.weight", {11, 32}),
      Zeros("blocks.0.att.time_decay", {32, 1}),
      Zeros("blocks.0.att.time_first", {32, 1}),
      Zeros("blocks.0.att.time_mix_k", {1, 1, 32}),
      Zeros("blocks.0.att.time_mix_v", {1, 1, 32}),
      Zeros("blocks.0.att.time_mix_r", {1, 1, 32}),
      Zeros("blocks.0.ffn.time_mix_k", {1, 1, 32}),
      Zeros("blocks.0.ffn.time_mix_r", {1, 1, 32}),
  };
  layer(&three, "att.", {"key.weight", "value.weight", "receptance.weight", "output.weight"});
  layer(&three, "ffn.", {"key.weight", "receptance.weight", "value.weight"});
  norms(&three, {"blocks.0.ln0", "blocks.0.ln1", "blocks.0.ln2", "ln_out"});

  const struct {
    std::vector<RawTensor> tensors;
    const char* message;
  } kCases[] = {
      {one, "RWKV-1 is recognised, but not supported"},
      {two, "RWKV-2 is recognised, but not supported"},
      {two_that_copies, "RWKV-2 is recognised, but not supported"},
      {three, "RWKV-3 is recognised, but not supported"},
  };
  for (const auto& test : kCases) {
    EXPECT_THAT(ConfigOf(test.tensors), StatusIs(kUnimplemented, HasSubstr(test.message)));
  }
}

TEST(ModelRefusalTest, TheBonusOfRwkv5HasTwoNames) {
  std::vector<RawTensor> tensors = *testing::MakeRandomModel(BaseOptions(ModelVersion::k5_0));
  for (int layer = 0; layer < 3; ++layer) {
    Named(&tensors, absl::StrCat("blocks.", layer, ".att.time_first")).spec.name =
        absl::StrCat("blocks.", layer, ".att.time_faaaa");
  }
  EXPECT_OK(ConfigOf(tensors));
  tensors.push_back(Zeros("blocks.1.att.time_first", {2}));
  EXPECT_THAT(ConfigOf(tensors), StatusIs(kInvalid, HasSubstr("time_faaaa\" of shape [2] is not part")));
}

TEST(ModelRefusalTest, AnyPartOfAGateMakesIt51) {
  std::vector<RawTensor> tensors = *testing::MakeRandomModel(BaseOptions(ModelVersion::k5_1));
  tensors.erase(
      std::remove_if(tensors.begin(), tensors.end(),
                     [](const RawTensor& tensor) { return tensor.spec.name.find(".att.gate.") != std::string::npos; }),
      tensors.end());
  EXPECT_THAT(ConfigOf(tensors), StatusIs(kInvalid, HasSubstr("\"blocks.0.att.gate.weight\" is missing")));
}

}  // namespace
}  // namespace rwkv::checkpoint
