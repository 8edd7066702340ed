// Bad arguments of every operation: the code, and a message that names the operation, the thing and its value.
#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/api/deep_embed.h"
#include "kernels/api/deep_embed_attention.h"
#include "kernels/api/embed.h"
#include "kernels/api/group_norm.h"
#include "kernels/api/layer_norm.h"
#include "kernels/api/matmul.h"
#include "kernels/api/sequence_span.h"
#include "kernels/api/token_shift.h"
#include "kernels/api/wkv4.h"
#include "kernels/api/wkv6.h"
#include "kernels/api/wkv7.h"
#include "kernels/api/wkv7_output.h"
#include "kernels/api/wkv7_prepare.h"
#include "kernels/base/dtype.h"
#include "kernels/base/matrix.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

// Memory that valid arguments may point to; no operation runs here.
struct Memory {
  std::vector<float> floats = std::vector<float>(4096);
  std::vector<int32_t> tokens = {0, 9, 4};
  std::vector<uint16_t> halves = std::vector<uint16_t>(64);
  std::vector<float> lengths = {2.0f, 0.0f, 5.0f, 0.0f};  // a slot's
  std::vector<SequenceSpan> spans = {{2, 0, 1}, {0, 1, 2}};
  float* misaligned() { return reinterpret_cast<float*>(reinterpret_cast<char*>(floats.data()) + 2); }
};

EmbedArgs ValidEmbed(Memory& m) {
  EmbedArgs args;
  args.rows = 3;
  args.tokens = m.tokens.data();
  args.embedding = {DType::kFloat16, 10, 8, m.floats.data()};
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

MatmulArgs ValidMatmul(Memory& m) {
  MatmulArgs args;
  args.rows = 3;
  args.weight = {DType::kFloat32, 10, 8, m.floats.data()};
  args.x = args.y = m.floats.data();
  return args;
}

TokenShiftArgs ValidTokenShift(Memory& m) {
  TokenShiftArgs args;
  args.rows = 3;
  args.width = 8;
  args.spans = m.spans.data();
  args.span_count = 2;
  args.state_pool = m.floats.data();
  args.state_stride = 8;
  args.state_slots = 4;
  args.x = m.floats.data();
  args.outputs = 2;
  args.mix[0] = args.mix[1] = args.y[0] = args.y[1] = m.floats.data();
  return args;
}

// [10, 40] in groups of 32.
MatrixView ValidQuantized(Memory& m, Quantization quantization) {
  MatrixView matrix = {DType::kFloat16, 10, 40, m.floats.data()};
  matrix.quantization = quantization;
  matrix.group = 32;
  matrix.scales = m.halves.data();
  if (quantization == Quantization::kInt4) matrix.minimums = m.halves.data() + 20;
  return matrix;
}

MatmulArgs ValidInt8Matmul(Memory& m) {
  MatmulArgs args = ValidMatmul(m);
  args.weight = ValidQuantized(m, Quantization::kInt8);
  return args;
}

MatmulArgs ValidInt4Matmul(Memory& m) {
  MatmulArgs args = ValidMatmul(m);
  args.weight = ValidQuantized(m, Quantization::kInt4);
  return args;
}

GroupNormArgs ValidGroupNorm(Memory& m) {
  GroupNormArgs args;
  args.rows = 3;
  args.heads = 2;
  args.head_size = 4;
  args.y = args.weight = args.bias = args.gate = args.out = m.floats.data();
  return args;
}

Wkv4Args ValidWkv4(Memory& m) {
  Wkv4Args args;
  args.rows = 3;
  args.width = 8;
  args.spans = m.spans.data();
  args.span_count = 2;
  args.state_slots = 4;
  args.aa = args.bb = args.pp = {m.floats.data(), 8};
  args.decay = args.bonus = args.r = args.k = args.v = args.y = m.floats.data();
  return args;
}

Wkv6Args ValidWkv6(Memory& m) {
  Wkv6Args args;
  args.rows = 3;
  args.heads = 2;
  args.head_size = 4;
  args.spans = m.spans.data();
  args.span_count = 2;
  args.state_pool = m.floats.data();
  args.state_stride = 32;
  args.state_slots = 4;
  args.r = args.w = args.k = args.v = args.bonus = args.y = m.floats.data();
  return args;
}

DeepEmbedArgs ValidDeepEmbed(Memory& m) {
  DeepEmbedArgs args;
  args.rows = 3;
  args.width = 4;
  args.tokens = m.tokens.data();
  args.table = {DType::kBFloat16, 10, 16, m.floats.data()};
  args.x = args.y = m.floats.data();
  return args;
}

// R = 3, Q = 8, D = 6, V = 10. Slot 2 has 5 tokens and gets 1, slot 0 has 2 and gets 2.
DeepEmbedAttentionArgs ValidAttention(Memory& m) {
  DeepEmbedAttentionArgs args;
  args.rows = 3;
  args.spans = m.spans.data();
  args.span_count = 2;
  args.state_slots = 4;
  args.capacity = 6;
  args.length = {m.lengths.data(), 1};
  args.token_cache = {m.floats.data(), 6};
  args.key_cache = args.value_cache = {m.floats.data(), 18};
  args.q_previous = {m.floats.data(), 8};
  args.k2 = {DType::kFloat32, 8, 3, m.floats.data()};
  args.v2 = {DType::kFloat32, 6, 3, m.floats.data()};
  args.k_emb = {DType::kFloat16, 10, 8, m.floats.data()};
  args.v_emb = {DType::kFloat16, 10, 6, m.floats.data()};
  args.x_q = args.x_k = args.x_v = args.lnq_weight = args.lnq_bias = args.lnk_weight = args.lnk_bias = args.lnv_weight =
      args.lnv_bias = m.floats.data();
  args.tokens = m.tokens.data();
  args.q = args.key = args.value = args.y = m.floats.data();
  return args;
}

Wkv7PrepareArgs ValidPrepare(Memory& m) {
  Wkv7PrepareArgs args;
  args.rows = 3;
  args.heads = 2;
  args.head_size = 4;
  args.decay_bias = args.iclr_bias = args.k_k = args.k_a = args.decay_lora = args.iclr_lora = m.floats.data();
  args.value_gate_bias = args.value_gate_lora = args.v_first = m.floats.data();
  args.k = args.v = args.w = args.a = args.b = m.floats.data();
  return args;
}

Wkv7Args ValidWkv7(Memory& m) {
  Wkv7Args args;
  args.rows = 3;
  args.heads = 2;
  args.head_size = 4;
  args.spans = m.spans.data();
  args.span_count = 2;
  args.state_pool = m.floats.data();
  args.state_stride = 32;
  args.state_slots = 4;
  args.r = args.w = args.k = args.v = args.a = args.b = args.y = m.floats.data();
  return args;
}

Wkv7OutputArgs ValidOutput(Memory& m) {
  Wkv7OutputArgs args;
  args.rows = 3;
  args.heads = 2;
  args.head_size = 4;
  args.ln_weight = args.ln_bias = args.bonus = m.floats.data();
  args.y = args.r = args.k = args.v = args.g = args.out = m.floats.data();
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

std::vector<Case> Cases() {
  return {
      {"EmbedNoRows", With(ValidEmbed, [](auto& a, auto&) { a.rows = 0; }), "embed: rows is 0"},
      {"EmbedTokenNegative", With(ValidEmbed, [](auto&, auto& m) { m.tokens[1] = -1; }), "embed: token -1 in row 1"},
      {"EmbedTokenTooLarge", With(ValidEmbed, [](auto&, auto& m) { m.tokens[2] = 10; }),
       "embed: token 10 in row 2 is outside the vocabulary of 10"},
      {"EmbedBiasMissing", With(ValidEmbed, [](auto& a, auto&) { a.bias = nullptr; }), "embed: bias is null"},
      {"EmbedTokensNull", With(ValidEmbed, [](auto& a, auto&) { a.tokens = nullptr; }), "embed: tokens is null"},
      {"EmbedTableNull", With(ValidEmbed, [](auto& a, auto&) { a.embedding.data = nullptr; }), "embedding is null"},
      {"EmbedTableMisaligned",
       With(ValidEmbed, [](auto& a, auto&) { a.embedding.data = static_cast<const char*>(a.embedding.data) + 1; }),
       "embedding is not aligned to its element of 2 bytes"},
      {"EmbedEpsilonNegative", With(ValidEmbed, [](auto& a, auto&) { a.epsilon = -1e-5f; }), "epsilon is -1e-05"},
      {"LayerNormNegativeWidth", With(ValidLayerNorm, [](auto& a, auto&) { a.width = -8; }), "layer_norm: width is -8"},
      {"LayerNormNullWeight", With(ValidLayerNorm, [](auto& a, auto&) { a.weight = nullptr; }), "weight is null"},
      {"LayerNormMisaligned", With(ValidLayerNorm, [](auto& a, auto& m) { a.y = m.misaligned(); }),
       "layer_norm: y is not aligned"},
      {"LayerNormEpsilonNan", With(ValidLayerNorm, [](auto& a, auto&) { a.epsilon = NAN; }), "epsilon is nan"},
      {"MatmulNoInputs", With(ValidMatmul, [](auto& a, auto&) { a.weight.cols = 0; }), "matmul: weight is [10, 0]"},
      {"MatmulNegativeOutputs", With(ValidMatmul, [](auto& a, auto&) { a.weight.rows = -1; }), "weight is [-1, 8]"},
      {"MatmulHugeRows", With(ValidMatmul, [](auto& a, auto&) { a.rows = int64_t{1} << 31; }), "rows is 2147483648"},
      {"MatmulUnknownDType", With(ValidMatmul, [](auto& a, auto&) { a.weight.dtype = static_cast<DType>(77); }),
       "unknown dtype 77"},
      {"MatmulUnknownActivation", With(ValidMatmul, [](auto& a, auto&) { a.activation = static_cast<Activation>(9); }),
       "unknown activation 9"},
      {"MatmulMisalignedFloats", With(ValidMatmul, [](auto& a, auto& m) { a.weight.data = m.misaligned(); }),
       "weight is not aligned to its element of 4 bytes"},
      {"MatmulBiasMisaligned", With(ValidMatmul, [](auto& a, auto& m) { a.bias = m.misaligned(); }),
       "matmul: bias is not aligned"},
      {"MatmulGateMisaligned", With(ValidMatmul, [](auto& a, auto& m) { a.gate = m.misaligned(); }),
       "matmul: gate is not aligned"},
      {"MatmulUnknownQuantization",
       With(ValidInt8Matmul, [](auto& a, auto&) { a.weight.quantization = static_cast<Quantization>(5); }),
       "matmul: weight has unknown quantization 5"},
      {"MatmulScalesMissing", With(ValidInt8Matmul, [](auto& a, auto&) { a.weight.scales = nullptr; }),
       "matmul: weight is int8 and has no scales"},
      {"MatmulMinimumsMissing", With(ValidInt4Matmul, [](auto& a, auto&) { a.weight.minimums = nullptr; }),
       "matmul: weight is int4 and has no minimums"},
      {"MatmulOddGroup", With(ValidInt4Matmul, [](auto& a, auto&) { a.weight.group = 48; }),
       "matmul: weight has groups of 48 weights, expected 32 or 64"},
      {"MatmulScalesOfFloats", With(ValidInt8Matmul, [](auto& a, auto&) { a.weight.dtype = DType::kFloat32; }),
       "matmul: weight has scales of fp32, expected fp16"},
      {"MatmulScalesMisaligned",
       With(ValidInt8Matmul,
            [](auto& a, auto& m) {
              a.weight.scales = reinterpret_cast<const uint16_t*>(reinterpret_cast<const char*>(m.halves.data()) + 1);
            }),
       "weight has scales or minimums that are not aligned to 2 bytes"},
      {"MatmulCodesNull", With(ValidInt8Matmul, [](auto& a, auto&) { a.weight.data = nullptr; }), "weight is null"},
      {"GroupNormNoHeads", With(ValidGroupNorm, [](auto& a, auto&) { a.heads = 0; }), "group_norm: heads is 0"},
      {"GroupNormWeightNull", With(ValidGroupNorm, [](auto& a, auto&) { a.weight = nullptr; }),
       "group_norm: weight is null"},
      {"GroupNormGateMisaligned", With(ValidGroupNorm, [](auto& a, auto& m) { a.gate = m.misaligned(); }),
       "group_norm: gate is not aligned"},
      {"GroupNormEpsilonNan", With(ValidGroupNorm, [](auto& a, auto&) { a.epsilon = NAN; }), "epsilon is nan"},
      {"Wkv4NoWidth", With(ValidWkv4, [](auto& a, auto&) { a.width = 0; }), "wkv4: width is 0"},
      {"Wkv4BonusNull", With(ValidWkv4, [](auto& a, auto&) { a.bonus = nullptr; }), "wkv4: bonus is null"},
      {"Wkv4PoolNull", With(ValidWkv4, [](auto& a, auto&) { a.bb.data = nullptr; }), "wkv4: bb is null"},
      {"Wkv4StrideTooSmall", With(ValidWkv4, [](auto& a, auto&) { a.pp.stride = 7; }),
       "wkv4: pp stride is 7, less than a state of 8 floats"},
      {"Wkv4SlotOutside", With(ValidWkv4, [](auto& a, auto&) { a.state_slots = 2; }),
       "wkv4: slot 2 is outside the pool of 2"},
      {"Wkv6NoHeadSize", With(ValidWkv6, [](auto& a, auto&) { a.head_size = 0; }), "wkv6: head_size is 0"},
      {"Wkv6BonusNull", With(ValidWkv6, [](auto& a, auto&) { a.bonus = nullptr; }), "wkv6: bonus is null"},
      {"Wkv6StrideTooSmall", With(ValidWkv6, [](auto& a, auto&) { a.state_stride = 31; }),
       "wkv6: state_pool stride is 31, less than a state of 32 floats"},
      {"Wkv6SlotTwice", With(ValidWkv6, [](auto&, auto& m) { m.spans[1].slot = 2; }), "wkv6: slot 2 is given twice"},
      {"DeepEmbedTableOfAnotherWidth", With(ValidDeepEmbed, [](auto& a, auto&) { a.width = 5; }),
       "deep_embed: table has 16 columns, expected the square of 5"},
      {"DeepEmbedTokenTooLarge", With(ValidDeepEmbed, [](auto&, auto& m) { m.tokens[1] = 10; }),
       "deep_embed: token 10 in row 1 is outside the vocabulary of 10"},
      {"DeepEmbedYNull", With(ValidDeepEmbed, [](auto& a, auto&) { a.y = nullptr; }), "deep_embed: y is null"},
      {"AttentionNoCapacity", With(ValidAttention, [](auto& a, auto&) { a.capacity = 0; }), "capacity is 0"},
      {"AttentionCapacityTooLarge", With(ValidAttention, [](auto& a, auto&) { a.capacity = (1 << 24) + 1; }),
       "deep_embed_attention: capacity is 16777217, more than 2^24"},
      {"AttentionRanksDiffer", With(ValidAttention, [](auto& a, auto&) { a.v2.cols = 4; }),
       "deep_embed_attention: v2 is [6, 4], expected [6, 3]"},
      {"AttentionTableOfAnotherWidth", With(ValidAttention, [](auto& a, auto&) { a.k_emb.cols = 7; }),
       "k_emb is [10, 7], expected [10, 8]"},
      {"AttentionVocabulariesDiffer", With(ValidAttention, [](auto& a, auto&) { a.v_emb.rows = 11; }),
       "v_emb is [11, 6], expected [10, 6]"},
      {"AttentionMixNull", With(ValidAttention, [](auto& a, auto&) { a.x_v = nullptr; }), "x_v is null"},
      {"AttentionCacheStrideTooSmall", With(ValidAttention, [](auto& a, auto&) { a.key_cache.stride = 17; }),
       "key_cache stride is 17, less than a state of 18 floats"},
      {"AttentionTokenTooLarge", With(ValidAttention, [](auto&, auto& m) { m.tokens[0] = 10; }),
       "token 10 in row 0 is outside the vocabulary of 10"},
      {"AttentionCacheFull", With(ValidAttention, [](auto&, auto& m) { m.lengths[2] = 6.0f; }),
       "slot 2 has 6 tokens and gets 1; the capacity is 6", absl::StatusCode::kResourceExhausted},
      {"AttentionSecondSpanTooLong", With(ValidAttention, [](auto&, auto& m) { m.lengths[0] = 5.0f; }),
       "slot 0 has 5 tokens and gets 2; the capacity is 6", absl::StatusCode::kResourceExhausted},
      {"AttentionLengthBroken", With(ValidAttention, [](auto&, auto& m) { m.lengths[2] = 1.5f; }),
       "slot 2 has a cache of 1.5 tokens", absl::StatusCode::kDataLoss},
      {"AttentionLengthNegative", With(ValidAttention, [](auto&, auto& m) { m.lengths[2] = -1.0f; }),
       "slot 2 has a cache of -1 tokens", absl::StatusCode::kDataLoss},
      {"AttentionLengthNan", With(ValidAttention, [](auto&, auto& m) { m.lengths[0] = NAN; }),
       "slot 0 has a cache of nan tokens", absl::StatusCode::kDataLoss},
      {"AttentionLengthHuge", With(ValidAttention, [](auto&, auto& m) { m.lengths[0] = 1e30f; }),
       "slot 0 has a cache of 1e+30 tokens", absl::StatusCode::kDataLoss},
      {"AttentionCachedTokenOutside", With(ValidAttention, [](auto&, auto& m) { m.floats[2 * 6 + 3] = 10.0f; }),
       "slot 2 has cached token 10 at 3, not an id in the vocabulary of 10", absl::StatusCode::kDataLoss},
      {"MatmulXNull", With(ValidMatmul, [](auto& a, auto&) { a.x = nullptr; }), "matmul: x is null"},
      {"TokenShiftTooManyOutputs", With(ValidTokenShift, [](auto& a, auto&) { a.outputs = 9; }), "outputs is 9"},
      {"TokenShiftMixNull", With(ValidTokenShift, [](auto& a, auto&) { a.mix[1] = nullptr; }), "mix is null"},
      {"TokenShiftStrideTooSmall", With(ValidTokenShift, [](auto& a, auto&) { a.state_stride = 7; }),
       "state_pool stride is 7, less than a state of 8 floats"},
      {"TokenShiftDeltaMisaligned", With(ValidTokenShift, [](auto& a, auto& m) { a.mix_delta[1] = m.misaligned(); }),
       "mix_delta is not aligned"},
      {"TokenShiftSlotOutside", With(ValidTokenShift, [](auto&, auto& m) { m.spans[0].slot = 4; }),
       "token_shift: slot 4 is outside the pool of 4"},
      {"Wkv7SlotNegative", With(ValidWkv7, [](auto&, auto& m) { m.spans[1].slot = -1; }),
       "wkv7: slot -1 is outside the pool of 4"},
      {"Wkv7SlotTwice", With(ValidWkv7, [](auto&, auto& m) { m.spans[1].slot = 2; }), "wkv7: slot 2 is given twice"},
      {"Wkv7SpansNull", With(ValidWkv7, [](auto& a, auto&) { a.spans = nullptr; }), "wkv7: spans is null"},
      {"Wkv7NoSpans", With(ValidWkv7, [](auto& a, auto&) { a.span_count = 0; }), "span_count is 0"},
      {"Wkv7MoreSpansThanRows", With(ValidWkv7, [](auto& a, auto&) { a.rows = 1; }), "2 spans for 1 rows"},
      {"Wkv7SpanEmpty", With(ValidWkv7, [](auto&, auto& m) { m.spans[0].row_count = 0; }), "span 0 has 0 rows from 0"},
      {"Wkv7SpanGap",
       With(ValidWkv7,
            [](auto&, auto& m) {
              m.spans[1] = {0, 2, 1};
            }),
       "span 1 has 1 rows from 2; expected at least one from 1"},
      {"Wkv7SpanBeyondRows", With(ValidWkv7, [](auto&, auto& m) { m.spans[1].row_count = 3; }), "span 1 has 3 rows"},
      {"Wkv7SpanCountOverflow", With(ValidWkv7, [](auto&, auto& m) { m.spans[1].row_count = INT64_MAX; }),
       "span 1 has"},
      {"Wkv7RowsNotCovered", With(ValidWkv7, [](auto&, auto& m) { m.spans[1].row_count = 1; }),
       "spans cover 2 of 3 rows"},
      {"Wkv7StrideTooSmall", With(ValidWkv7, [](auto& a, auto&) { a.state_stride = 31; }),
       "less than a state of 32 floats"},
      {"Wkv7NoHeads", With(ValidWkv7, [](auto& a, auto&) { a.heads = 0; }), "wkv7: heads is 0"},
      {"Wkv7PoolNull", With(ValidWkv7, [](auto& a, auto&) { a.state_pool = nullptr; }), "state_pool is null"},
      {"Wkv7YMisaligned", With(ValidWkv7, [](auto& a, auto& m) { a.y = m.misaligned(); }), "y is not aligned"},
      {"PrepareValueFirstMissing", With(ValidPrepare, [](auto& a, auto&) { a.v_first = nullptr; }), "v_first is null"},
      {"PrepareGateBiasMissing", With(ValidPrepare, [](auto& a, auto&) { a.value_gate_bias = nullptr; }),
       "wkv7_prepare: value_gate_bias is null"},
      {"PrepareKeyNull", With(ValidPrepare, [](auto& a, auto&) { a.k = nullptr; }), "wkv7_prepare: k is null"},
      {"PrepareNoHeadSize", With(ValidPrepare, [](auto& a, auto&) { a.head_size = 0; }), "head_size is 0"},
      {"OutputGateNull", With(ValidOutput, [](auto& a, auto&) { a.g = nullptr; }), "wkv7_output: g is null"},
      {"OutputEpsilonNegative", With(ValidOutput, [](auto& a, auto&) { a.epsilon = -1.0f; }), "epsilon is -1"},
      {"OutputNoRows", With(ValidOutput, [](auto& a, auto&) { a.rows = 0; }), "wkv7_output: rows is 0"},
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
  EXPECT_OK(Validate(ValidMatmul(memory)));
  EXPECT_OK(Validate(ValidInt8Matmul(memory)));
  EXPECT_OK(Validate(ValidInt4Matmul(memory)));
  EXPECT_OK(Validate(ValidGroupNorm(memory)));
  EXPECT_OK(Validate(ValidWkv4(memory)));
  EXPECT_OK(Validate(ValidWkv6(memory)));
  EXPECT_OK(Validate(ValidDeepEmbed(memory)));
  EXPECT_OK(Validate(ValidAttention(memory)));
  EXPECT_OK(Validate(ValidTokenShift(memory)));
  EXPECT_OK(Validate(ValidPrepare(memory)));
  EXPECT_OK(Validate(ValidWkv7(memory)));
  EXPECT_OK(Validate(ValidOutput(memory)));
}

TEST(ValidateGoodTest, OptionalInputsMayBeMissingTogether) {
  Memory memory;
  EmbedArgs embed = ValidEmbed(memory);
  embed.weight = embed.bias = nullptr;
  EXPECT_OK(Validate(embed));
  Wkv7PrepareArgs prepare = ValidPrepare(memory);
  prepare.value_gate_bias = prepare.value_gate_lora = prepare.v_first = nullptr;
  EXPECT_OK(Validate(prepare));
  GroupNormArgs group_norm = ValidGroupNorm(memory);
  group_norm.gate = nullptr;
  EXPECT_OK(Validate(group_norm));
}

}  // namespace
}  // namespace rwkv::kernels
