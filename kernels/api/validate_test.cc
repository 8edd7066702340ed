// Bad arguments of every operation: the code, and a message that names the operation, the thing and its value.
#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/api/embed.h"
#include "kernels/api/layer_norm.h"
#include "kernels/api/matmul.h"
#include "kernels/api/sequence_span.h"
#include "kernels/api/token_shift.h"
#include "kernels/api/wkv7.h"
#include "kernels/api/wkv7_output.h"
#include "kernels/api/wkv7_prepare.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

// Memory that valid arguments may point to; no operation runs here.
struct Memory {
  std::vector<float> floats = std::vector<float>(4096);
  std::vector<int32_t> tokens = {0, 9, 4};
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
      {"MatmulXNull", With(ValidMatmul, [](auto& a, auto&) { a.x = nullptr; }), "matmul: x is null"},
      {"TokenShiftTooManyOutputs", With(ValidTokenShift, [](auto& a, auto&) { a.outputs = 9; }), "outputs is 9"},
      {"TokenShiftMixNull", With(ValidTokenShift, [](auto& a, auto&) { a.mix[1] = nullptr; }), "mix is null"},
      {"TokenShiftStrideTooSmall", With(ValidTokenShift, [](auto& a, auto&) { a.state_stride = 7; }),
       "state_stride is 7, less than a state of 8 floats"},
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

TEST_P(ValidateTest, IsInvalidArgument) {
  Memory memory;
  EXPECT_THAT(GetParam().validate(memory), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(GetParam().message)));
}

INSTANTIATE_TEST_SUITE_P(BadArguments, ValidateTest, ::testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

TEST(ValidateGoodTest, GoodArgumentsPass) {
  Memory memory;
  EXPECT_OK(Validate(ValidEmbed(memory)));
  EXPECT_OK(Validate(ValidLayerNorm(memory)));
  EXPECT_OK(Validate(ValidMatmul(memory)));
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
}

}  // namespace
}  // namespace rwkv::kernels
