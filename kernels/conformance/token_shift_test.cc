// TokenShift of every backend against the reference, and the laws of a recurrence.
#include "kernels/api/token_shift.h"

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/base/stream.h"
#include "kernels/conformance/conformance.h"
#include "kernels/reference/reference.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::conformance {
namespace {

constexpr float kUntouched = 1234.5f;

struct Case {
  std::string name;
  std::vector<int64_t> lengths = {3, 1, 4};
  std::vector<int32_t> slots = {2, 0, 3};
  int64_t slot_count = 5;
  int64_t width = 48;
  int64_t outputs = 6;
  int64_t stride_gap = 0;
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  const auto add = [&cases](std::string name, auto change) {
    Case c;
    c.name = std::move(name);
    change(c);
    cases.push_back(c);
  };
  add("base", [](Case&) {});
  add("one_token", [](Case& c) { c.lengths = {1}, c.slots = {4}; });
  add("one_sequence", [](Case& c) { c.lengths = {7}, c.slots = {1}; });
  add("slots_reversed", [](Case& c) { c.slots = {3, 2, 1}; });
  add("one_output", [](Case& c) { c.outputs = 1; });
  add("most_outputs", [](Case& c) { c.outputs = kMaxTokenShiftOutputs; });
  add("pool_with_gaps", [](Case& c) { c.stride_gap = 13; });
  for (int64_t width : {1, 15, 17, 40}) {
    add("width_" + std::to_string(width), [=](Case& c) { c.width = width; });
  }
  return cases;
}

struct Sequence {
  int64_t length;
  std::vector<float> x;      // [length, D]
  std::vector<float> state;  // [D]
};

struct Result {
  std::vector<std::vector<float>> y;      // per sequence: [K, length, D]
  std::vector<std::vector<float>> state;  // per sequence: [D]
};

std::vector<Sequence> MakeSequences(const Case& c) {
  Random random(13);
  std::vector<Sequence> sequences;
  for (int64_t length : c.lengths) {
    Sequence sequence;
    sequence.length = length;
    sequence.x = random.Uniforms(length * c.width, -2.0f, 2.0f);
    sequence.state = random.Uniforms(c.width, -2.0f, 2.0f);
    sequences.push_back(sequence);
  }
  return sequences;
}

Result Compute(TokenShiftOp* op, const Case& c, const std::vector<Sequence>& sequences,
               const std::vector<int32_t>& slots) {
  Random random(17);
  std::vector<std::vector<float>> mix;  // Not confined to [0, 1] in trained models.
  for (int64_t m = 0; m < c.outputs; ++m) mix.push_back(random.Uniforms(c.width, -0.3f, 1.4f));

  const int64_t stride = c.width + c.stride_gap;
  std::vector<float> pool(static_cast<size_t>(c.slot_count * stride), kUntouched);
  std::vector<float> x;
  std::vector<int64_t> lengths;
  for (size_t i = 0; i < sequences.size(); ++i) {
    x.insert(x.end(), sequences[i].x.begin(), sequences[i].x.end());
    lengths.push_back(sequences[i].length);
    std::copy(sequences[i].state.begin(), sequences[i].state.end(), pool.begin() + slots[i] * stride);
  }
  const std::vector<SequenceSpan> spans = PackSpans(lengths, slots);
  std::vector<std::vector<float>> y(static_cast<size_t>(c.outputs), std::vector<float>(x.size()));
  TokenShiftArgs args;
  args.rows = static_cast<int64_t>(x.size()) / c.width;
  args.width = c.width;
  args.spans = spans.data();
  args.span_count = static_cast<int64_t>(spans.size());
  args.state_pool = pool.data();
  args.state_stride = stride;
  args.state_slots = c.slot_count;
  args.x = x.data();
  args.outputs = c.outputs;
  for (int64_t m = 0; m < c.outputs; ++m) {
    args.mix[m] = mix[m].data();
    args.y[m] = y[m].data();
  }
  CpuStream stream;
  EXPECT_OK(op(args, stream));

  Result result;
  for (size_t i = 0; i < sequences.size(); ++i) {
    std::vector<float> mine;
    for (int64_t m = 0; m < c.outputs; ++m) {
      const auto begin = y[m].begin() + spans[i].row_begin * c.width;
      mine.insert(mine.end(), begin, begin + spans[i].row_count * c.width);
    }
    result.y.push_back(mine);
    const auto state = pool.begin() + slots[i] * stride;
    result.state.emplace_back(state, state + c.width);
    std::fill(state, state + c.width, kUntouched);
  }
  EXPECT_EQ(std::count(pool.begin(), pool.end(), kUntouched), static_cast<int64_t>(pool.size()))
      << "wrote outside the states of its sequences";
  return result;
}

class TokenShiftTest : public ::testing::TestWithParam<std::tuple<const OpTable*, Case>> {};

TEST_P(TokenShiftTest, EqualsReference) {
  const auto& [table, c] = GetParam();
  const std::vector<Sequence> sequences = MakeSequences(c);
  const Result expected = Compute(reference::TokenShift, c, sequences, c.slots);
  const Result actual = Compute(table->token_shift, c, sequences, c.slots);
  for (size_t i = 0; i < sequences.size(); ++i) {
    // Three roundings of at most |x| + 2 |x| * 1.4, with |x| <= 2.
    EXPECT_TRUE(AllClose(expected.y[i], actual.y[i], 3 * 8.0 * kUnitRoundoff)) << "sequence " << i;
    EXPECT_TRUE(SameBits(expected.state[i], actual.state[i])) << "sequence " << i;
  }
}

TEST_P(TokenShiftTest, StateIsTheLastInput) {
  const auto& [table, c] = GetParam();
  const std::vector<Sequence> sequences = MakeSequences(c);
  const Result actual = Compute(table->token_shift, c, sequences, c.slots);
  for (size_t i = 0; i < sequences.size(); ++i) {
    EXPECT_TRUE(SameBits(absl::MakeConstSpan(sequences[i].x).last(static_cast<size_t>(c.width)), actual.state[i]));
  }
}

TEST_P(TokenShiftTest, SequenceAloneHasTheBitsOfSequenceAmongOthers) {
  const auto& [table, c] = GetParam();
  const std::vector<Sequence> sequences = MakeSequences(c);
  const Result together = Compute(table->token_shift, c, sequences, c.slots);
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Result alone = Compute(table->token_shift, c, {sequences[i]}, {0});
    EXPECT_TRUE(SameBits(together.y[i], alone.y[0])) << "sequence " << i;
    EXPECT_TRUE(SameBits(together.state[i], alone.state[0])) << "sequence " << i;
  }
}

TEST_P(TokenShiftTest, SplitAtAnyTokenHasTheBitsOfTheWhole) {
  const auto& [table, c] = GetParam();
  for (const Sequence& sequence : MakeSequences(c)) {
    const Result whole = Compute(table->token_shift, c, {sequence}, {1});
    for (int64_t split = 1; split < sequence.length; ++split) {
      Sequence head = {split, {sequence.x.begin(), sequence.x.begin() + split * c.width}, sequence.state};
      const Result first = Compute(table->token_shift, c, {head}, {1});
      Sequence tail = {
          sequence.length - split, {sequence.x.begin() + split * c.width, sequence.x.end()}, first.state[0]};
      const Result second = Compute(table->token_shift, c, {tail}, {1});
      std::vector<float> joined;
      for (int64_t m = 0; m < c.outputs; ++m) {
        const auto a = first.y[0].begin() + m * head.length * c.width;
        joined.insert(joined.end(), a, a + head.length * c.width);
        const auto b = second.y[0].begin() + m * tail.length * c.width;
        joined.insert(joined.end(), b, b + tail.length * c.width);
      }
      EXPECT_TRUE(SameBits(whole.y[0], joined)) << "split at " << split;
      EXPECT_TRUE(SameBits(whole.state[0], second.state[0])) << "split at " << split;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, TokenShiftTest,
                         ::testing::Combine(::testing::ValuesIn(Backends()), ::testing::ValuesIn(Cases())),
                         [](const auto& info) {
                           return TestName(std::get<0>(info.param)) + "_" + std::get<1>(info.param).name;
                         });

}  // namespace
}  // namespace rwkv::kernels::conformance
