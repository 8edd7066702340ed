// Bad arguments of every operation: the code, and a message that names the operation, the thing and its value.
#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/api/deep_embed.h"
#include "kernels/api/deep_embed_attention.h"
#include "kernels/api/embed.h"
#include "kernels/api/layer_norm.h"
#include "kernels/api/mix_input.h"
#include "kernels/api/products.h"
#include "kernels/api/sequence_span.h"
#include "kernels/api/step_rows.h"
#include "kernels/api/wkv4.h"
#include "kernels/api/wkv6.h"
#include "kernels/api/wkv7.h"
#include "kernels/base/weight.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

// Memory that valid arguments may point to; no operation runs here.
struct Memory {
  std::vector<float> floats = std::vector<float>(4096);
  std::vector<int32_t> tokens = {0, 9, 4};
  std::vector<float> lengths = {2.0f, 0.0f, 5.0f, 0.0f};  // a slot's
  std::vector<SequenceSpan> spans = {{2, 0, 1}, {0, 1, 2}};
  StepRows step = {3, 2, spans.data(), tokens.data()};
  Weight k2;
  Weight v2;
  Product product;
  float* misaligned() { return reinterpret_cast<float*>(reinterpret_cast<char*>(floats.data()) + 2); }
};

EmbedArgs ValidEmbed(Memory& m) {
  EmbedArgs args;
  args.rows = 3;
  args.tokens = m.tokens.data();
  args.embedding = &m.k2;
  args.weight = args.bias = args.x = m.floats.data();
  return args;
}

LayerNormArgs ValidLayerNorm(Memory& m) {
  LayerNormArgs args;
  args.rows = 3;
  args.width = 8;
  args.x = args.weight = args.bias = args.y = m.floats.data();
  return args;
}

ProductsArgs ValidProducts(Memory& m) {
  m.product.weight = &m.k2;
  m.product.x = m.product.y = m.floats.data();
  return {3, &m.product, 1};
}

MixInputArgs ValidMixInput(Memory& m) {
  MixInputArgs args;
  args.step = &m.step;
  args.width = 8;
  args.shift = {m.floats.data(), 8};
  args.x = args.weight = args.bias = m.floats.data();
  args.outputs = 2;
  args.mix[0] = args.mix[1] = args.y[0] = args.y[1] = m.floats.data();
  return args;
}

Wkv4Args ValidWkv4(Memory& m) {
  Wkv4Args args;
  args.step = &m.step;
  args.width = 8;
  args.aa = args.bb = args.pp = {m.floats.data(), 8};
  args.decay = args.bonus = args.r = args.k = args.v = args.y = m.floats.data();
  return args;
}

Wkv6Args ValidWkv6(Memory& m) {
  Wkv6Args args;
  args.step = &m.step;
  args.heads = 2;
  args.head_size = 4;
  args.state = {m.floats.data(), 32};
  args.ln_weight = args.ln_bias = args.bonus = m.floats.data();
  args.r = args.w = args.k = args.v = args.gate = args.y = m.floats.data();
  return args;
}

Wkv7Args ValidWkv7(Memory& m) {
  Wkv7Args args;
  args.step = &m.step;
  args.heads = 2;
  args.head_size = 4;
  args.state = {m.floats.data(), 32};
  args.decay_bias = args.iclr_bias = args.k_k = args.k_a = args.bonus = args.ln_weight = args.ln_bias = m.floats.data();
  args.r = args.k = args.v = args.g = args.decay_lora = args.iclr_lora = args.y = m.floats.data();
  args.value_gate_bias = args.value_gate_lora = args.v_first = m.floats.data();
  return args;
}

DeepEmbedArgs ValidDeepEmbed(Memory& m) {
  DeepEmbedArgs args;
  args.rows = 3;
  args.width = 4;
  args.matrices = args.x = args.y = m.floats.data();
  return args;
}

// R = 3, Q = 8, D = 6, V = 10. Slot 2 has 5 tokens and gets 1, slot 0 has 2 and gets 2.
DeepEmbedAttentionArgs ValidAttention(Memory& m) {
  DeepEmbedAttentionArgs args;
  args.step = &m.step;
  args.vocabulary = 10;
  args.capacity = 6;
  args.length = {m.lengths.data(), 1};
  args.token_cache = {m.floats.data(), 6};
  args.key_cache = args.value_cache = {m.floats.data(), 18};
  args.q_previous = {m.floats.data(), 8};
  m.k2.matrix = {DType::kFloat32, 8, 3, m.floats.data()};
  m.v2.matrix = {DType::kFloat32, 6, 3, m.floats.data()};
  args.k2 = &m.k2;
  args.v2 = &m.v2;
  args.k_emb = args.v_emb = m.floats.data();
  args.x_q = args.x_k = args.x_v = args.lnq_weight = args.lnq_bias = args.lnk_weight = args.lnk_bias = args.lnv_weight =
      args.lnv_bias = m.floats.data();
  args.q = args.key = args.value = args.y = m.floats.data();
  return args;
}

// One row changes one thing of valid arguments.
struct Case {
  std::string name;
  std::function<absl::Status(Memory&)> validate;
  std::string message;
  absl::StatusCode code = absl::StatusCode::kInvalidArgument;
};

template <typename Args, typename Change>
std::function<absl::Status(Memory&)> With(Args (*valid)(Memory&), Change change) {
  return [=](Memory& m) {
    Args args = valid(m);
    change(args, m);
    return Validate(args);
  };
}

template <typename Change>
std::function<absl::Status(Memory&)> WithCaches(Change change) {
  return [=](Memory& m) {
    const DeepEmbedAttentionArgs args = ValidAttention(m);
    change(m);
    return ValidateCaches(args);
  };
}

std::vector<Case> Cases() {
  return {
      {"EmbedNoRows", With(ValidEmbed, [](auto& a, auto&) { a.rows = 0; }), "embed: rows is 0"},
      {"EmbedBiasMissing", With(ValidEmbed, [](auto& a, auto&) { a.bias = nullptr; }), "embed: bias is null"},
      {"EmbedTokensNull", With(ValidEmbed, [](auto& a, auto&) { a.tokens = nullptr; }), "embed: tokens is null"},
      {"EmbedTableNull", With(ValidEmbed, [](auto& a, auto&) { a.embedding = nullptr; }), "embedding is null"},
      {"EmbedEpsilonNegative", With(ValidEmbed, [](auto& a, auto&) { a.epsilon = -1e-5f; }), "epsilon is -1e-05"},
      {"LayerNormNegativeWidth", With(ValidLayerNorm, [](auto& a, auto&) { a.width = -8; }), "layer_norm: width is -8"},
      {"LayerNormNullWeight", With(ValidLayerNorm, [](auto& a, auto&) { a.weight = nullptr; }), "weight is null"},
      {"LayerNormMisaligned", With(ValidLayerNorm, [](auto& a, auto& m) { a.y = m.misaligned(); }),
       "layer_norm: y is not aligned"},
      {"LayerNormEpsilonNan", With(ValidLayerNorm, [](auto& a, auto&) { a.epsilon = NAN; }), "epsilon is nan"},
      {"ProductsNone", With(ValidProducts, [](auto& a, auto&) { a.count = 0; }), "products: count is 0"},
      {"ProductsHugeRows", With(ValidProducts, [](auto& a, auto&) { a.rows = int64_t{1} << 31; }),
       "products: rows is 2147483648"},
      {"ProductsNull", With(ValidProducts, [](auto& a, auto&) { a.products = nullptr; }), "products is null"},
      {"ProductsWeightNull", With(ValidProducts, [](auto&, auto& m) { m.product.weight = nullptr; }), "weight is null"},
      {"ProductsXNull", With(ValidProducts, [](auto&, auto& m) { m.product.x = nullptr; }), "products: x is null"},
      {"ProductsBiasMisaligned", With(ValidProducts, [](auto&, auto& m) { m.product.bias = m.misaligned(); }),
       "bias is not aligned"},
      {"ProductsGateMisaligned", With(ValidProducts, [](auto&, auto& m) { m.product.gate = m.misaligned(); }),
       "gate is not aligned"},
      {"ProductsUnknownActivation",
       With(ValidProducts, [](auto&, auto& m) { m.product.activation = static_cast<Activation>(9); }),
       "products: unknown activation 9"},
      {"MixInputNoStep", With(ValidMixInput, [](auto& a, auto&) { a.step = nullptr; }), "mix_input: step is null"},
      {"MixInputNoRows", With(ValidMixInput, [](auto&, auto& m) { m.step.rows = 0; }), "mix_input: rows is 0"},
      {"MixInputNoSpans", With(ValidMixInput, [](auto&, auto& m) { m.step.span_count = 0; }), "span_count is 0"},
      {"MixInputSpansNull", With(ValidMixInput, [](auto&, auto& m) { m.step.spans = nullptr; }), "spans is null"},
      {"MixInputTooManyOutputs", With(ValidMixInput, [](auto& a, auto&) { a.outputs = 7; }), "outputs is 7"},
      {"MixInputMixNull", With(ValidMixInput, [](auto& a, auto&) { a.mix[1] = nullptr; }), "mix is null"},
      {"MixInputBiasMissing", With(ValidMixInput, [](auto& a, auto&) { a.bias = nullptr; }), "bias is null"},
      {"MixInputNormedMisaligned", With(ValidMixInput, [](auto& a, auto& m) { a.normed = m.misaligned(); }),
       "normed is not aligned"},
      {"MixInputStrideTooSmall", With(ValidMixInput, [](auto& a, auto&) { a.shift.stride = 7; }),
       "mix_input: shift stride is 7, not in [8, 2^31)"},
      {"MixInputDeltaMisaligned", With(ValidMixInput, [](auto& a, auto& m) { a.mix_delta[1] = m.misaligned(); }),
       "mix_delta is not aligned"},
      {"Wkv4NoWidth", With(ValidWkv4, [](auto& a, auto&) { a.width = 0; }), "wkv4: width is 0"},
      {"Wkv4BonusNull", With(ValidWkv4, [](auto& a, auto&) { a.bonus = nullptr; }), "wkv4: bonus is null"},
      {"Wkv4StateNull", With(ValidWkv4, [](auto& a, auto&) { a.bb.data = nullptr; }), "wkv4: bb is null"},
      {"Wkv4StrideTooSmall", With(ValidWkv4, [](auto& a, auto&) { a.pp.stride = 7; }), "wkv4: pp stride is 7"},
      {"Wkv6NoHeadSize", With(ValidWkv6, [](auto& a, auto&) { a.head_size = 0; }), "wkv6: head_size is 0"},
      {"Wkv6BonusNull", With(ValidWkv6, [](auto& a, auto&) { a.bonus = nullptr; }), "wkv6: bonus is null"},
      {"Wkv6StrideTooSmall", With(ValidWkv6, [](auto& a, auto&) { a.state.stride = 31; }),
       "wkv6: state stride is 31, not in [32, 2^31)"},
      {"Wkv6GateMisaligned", With(ValidWkv6, [](auto& a, auto& m) { a.gate = m.misaligned(); }), "gate is not aligned"},
      {"Wkv6EpsilonNan", With(ValidWkv6, [](auto& a, auto&) { a.epsilon = NAN; }), "epsilon is nan"},
      {"Wkv7NoHeads", With(ValidWkv7, [](auto& a, auto&) { a.heads = 0; }), "wkv7: heads is 0"},
      {"Wkv7StateNull", With(ValidWkv7, [](auto& a, auto&) { a.state.data = nullptr; }), "wkv7: state is null"},
      {"Wkv7StrideTooSmall", With(ValidWkv7, [](auto& a, auto&) { a.state.stride = 31; }), "state stride is 31"},
      {"Wkv7YMisaligned", With(ValidWkv7, [](auto& a, auto& m) { a.y = m.misaligned(); }), "y is not aligned"},
      {"Wkv7ValueFirstMissing", With(ValidWkv7, [](auto& a, auto&) { a.v_first = nullptr; }), "v_first is null"},
      {"Wkv7GateBiasMissing", With(ValidWkv7, [](auto& a, auto&) { a.value_gate_bias = nullptr; }),
       "wkv7: value_gate_bias is null"},
      {"Wkv7KeyNull", With(ValidWkv7, [](auto& a, auto&) { a.k = nullptr; }), "wkv7: k is null"},
      {"Wkv7GateNull", With(ValidWkv7, [](auto& a, auto&) { a.g = nullptr; }), "wkv7: g is null"},
      {"Wkv7EpsilonNegative", With(ValidWkv7, [](auto& a, auto&) { a.epsilon = -1.0f; }), "epsilon is -1"},
      {"DeepEmbedNoWidth", With(ValidDeepEmbed, [](auto& a, auto&) { a.width = 0; }), "deep_embed: width is 0"},
      {"DeepEmbedYNull", With(ValidDeepEmbed, [](auto& a, auto&) { a.y = nullptr; }), "deep_embed: y is null"},
      {"AttentionNoCapacity", With(ValidAttention, [](auto& a, auto&) { a.capacity = 0; }), "capacity is 0"},
      {"AttentionCapacityTooLarge", With(ValidAttention, [](auto& a, auto&) { a.capacity = (1 << 24) + 1; }),
       "deep_embed_attention: capacity 16777217"},
      {"AttentionVocabularyTooLarge", With(ValidAttention, [](auto& a, auto&) { a.vocabulary = (1 << 24) + 1; }),
       "vocabulary 16777217 is more than 2^24"},
      {"AttentionRanksDiffer", With(ValidAttention, [](auto&, auto& m) { m.v2.matrix.cols = 4; }),
       "deep_embed_attention: v2 has 4 inputs, k2 has 3"},
      {"AttentionMixNull", With(ValidAttention, [](auto& a, auto&) { a.x_v = nullptr; }), "x_v is null"},
      {"AttentionCacheStrideTooSmall", With(ValidAttention, [](auto& a, auto&) { a.key_cache.stride = 17; }),
       "key_cache stride is 17, not in [18, 2^31)"},
      {"AttentionCacheFull", WithCaches([](auto& m) { m.lengths[2] = 6.0f; }),
       "slot 2 has 6 tokens and gets 1; the capacity is 6", absl::StatusCode::kResourceExhausted},
      {"AttentionSecondSpanTooLong", WithCaches([](auto& m) { m.lengths[0] = 5.0f; }),
       "slot 0 has 5 tokens and gets 2; the capacity is 6", absl::StatusCode::kResourceExhausted},
      {"AttentionLengthBroken", WithCaches([](auto& m) { m.lengths[2] = 1.5f; }), "slot 2 has a cache of 1.5 tokens",
       absl::StatusCode::kDataLoss},
      {"AttentionLengthNegative", WithCaches([](auto& m) { m.lengths[2] = -1.0f; }), "slot 2 has a cache of -1 tokens",
       absl::StatusCode::kDataLoss},
      {"AttentionLengthNan", WithCaches([](auto& m) { m.lengths[0] = NAN; }), "slot 0 has a cache of nan tokens",
       absl::StatusCode::kDataLoss},
      {"AttentionLengthHuge", WithCaches([](auto& m) { m.lengths[0] = 1e30f; }), "slot 0 has a cache of 1e+30 tokens",
       absl::StatusCode::kDataLoss},
      {"AttentionCachedTokenOutside", WithCaches([](auto& m) { m.floats[2 * 6 + 3] = 10.0f; }),
       "slot 2 has cached token 10 at 3, not an id in the vocabulary of 10", absl::StatusCode::kDataLoss},
  };
}

class ValidateTest : public ::testing::TestWithParam<Case> {};

TEST_P(ValidateTest, IsAnErrorThatNamesTheThing) {
  Memory memory;
  EXPECT_THAT(GetParam().validate(memory), StatusIs(GetParam().code, HasSubstr(GetParam().message)));
}

INSTANTIATE_TEST_SUITE_P(BadArguments, ValidateTest, ::testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

TEST(ValidateGoodTest, GoodArgumentsPass) {
  Memory memory;
  EXPECT_OK(Validate(ValidEmbed(memory)));
  EXPECT_OK(Validate(ValidLayerNorm(memory)));
  EXPECT_OK(Validate(ValidProducts(memory)));
  EXPECT_OK(Validate(ValidMixInput(memory)));
  EXPECT_OK(Validate(ValidWkv4(memory)));
  EXPECT_OK(Validate(ValidWkv6(memory)));
  EXPECT_OK(Validate(ValidWkv7(memory)));
  EXPECT_OK(Validate(ValidDeepEmbed(memory)));
  EXPECT_OK(Validate(ValidAttention(memory)));
  EXPECT_OK(ValidateCaches(ValidAttention(memory)));
}

TEST(ValidateGoodTest, OptionalInputsMayBeMissingTogether) {
  Memory memory;
  EmbedArgs embed = ValidEmbed(memory);
  embed.weight = embed.bias = nullptr;
  EXPECT_OK(Validate(embed));
  MixInputArgs mix = ValidMixInput(memory);
  mix.weight = mix.bias = nullptr;
  EXPECT_OK(Validate(mix));
  Wkv7Args wkv7 = ValidWkv7(memory);
  wkv7.value_gate_bias = wkv7.value_gate_lora = wkv7.v_first = nullptr;
  EXPECT_OK(Validate(wkv7));
  Wkv6Args wkv6 = ValidWkv6(memory);
  wkv6.gate = nullptr;
  EXPECT_OK(Validate(wkv6));
}

// The caches of nobody are not looked at.
TEST(ValidateGoodTest, PaddingHasNoCaches) {
  Memory memory;
  memory.spans[0].slot = kPaddingSlot;
  EXPECT_OK(ValidateCaches(ValidAttention(memory)));
}

}  // namespace
}  // namespace rwkv::kernels
