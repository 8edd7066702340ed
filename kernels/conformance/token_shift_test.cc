// TokenShift of every backend against the reference, and the laws of a recurrence.
#include "kernels/api/token_shift.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "kernels/api/op_table.h"
#include "kernels/api/sequence_span.h"
#include "kernels/base/host_device.h"
#include "kernels/base/stream.h"
#include "kernels/conformance/conformance.h"
#include "kernels/conformance/recurrence.h"
#include "kernels/reference/reference.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::conformance {
namespace {

struct Case {
  std::string name;
  std::vector<int64_t> lengths = {3, 1, 4};
  Packing packing = {{2, 0, 3}, 5, 0};
  int64_t width = 48;
  int64_t outputs = 6;
  int64_t deltas = 0;     // how many of the outputs have a delta, from the last one on
  bool in_place = false;  // y of those is their delta
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
  add("one_token", [](Case& c) { c.lengths = {1}, c.packing.slots = {4}; });
  add("one_sequence", [](Case& c) { c.lengths = {7}, c.packing.slots = {1}; });
  add("slots_reversed", [](Case& c) { c.packing.slots = {3, 2, 1}; });
  add("one_output", [](Case& c) { c.outputs = 1; });
  add("most_outputs", [](Case& c) { c.outputs = kMaxTokenShiftOutputs; });
  add("pool_with_gaps", [](Case& c) { c.packing.stride_gap = 13; });
  add("one_delta", [](Case& c) { c.deltas = 1; });
  add("all_deltas", [](Case& c) { c.deltas = 6; });
  add("deltas_in_place", [](Case& c) { c.deltas = 5, c.in_place = true; });
  for (int64_t width : {1, 15, 17, 40}) {
    add("width_" + std::to_string(width), [=](Case& c) { c.width = width; });
    add("deltas_width_" + std::to_string(width), [=](Case& c) { c.width = width, c.deltas = 2; });
  }
  return cases;
}

// Inputs: x, and a delta for each output (of which c.deltas are used). One state: the last x.
std::vector<Sequence> MakeSequences(const Case& c) {
  Random random(13);
  std::vector<Sequence> sequences;
  for (int64_t length : c.lengths) {
    Sequence sequence;
    sequence.length = length;
    sequence.inputs.push_back(random.Uniforms(length * c.width, -2.0f, 2.0f));
    for (int64_t m = 0; m < c.outputs; ++m) {
      sequence.inputs.push_back(random.Uniforms(length * c.width, -0.5f, 0.5f));
    }
    sequence.states.push_back(random.Uniforms(c.width, -2.0f, 2.0f));
    sequences.push_back(sequence);
  }
  return sequences;
}

// y is [rows, outputs, width]: the rows of all outputs, side by side.
Recurrence MakeRecurrence(const Case& c, bool keep_state = false) {
  const auto run = [&c, keep_state](const OpTable& table, const PackedCall& call, Stream& stream) {
    Random random(17);
    std::vector<Floats> mix;  // Not confined to [0, 1] in trained models.
    for (int64_t m = 0; m < c.outputs; ++m) mix.push_back(random.Uniforms(c.width, -0.3f, 1.4f));
    std::vector<Floats> delta(call.inputs.begin() + 1, call.inputs.end());
    std::vector<Floats> y(mix.size(), Floats(call.inputs[0].size()));
    TokenShiftArgs args;
    args.rows = call.rows;
    args.width = c.width;
    args.spans = call.spans.data();
    args.span_count = static_cast<int64_t>(call.spans.size());
    args.state_pool = call.states[0].data;
    args.state_stride = call.states[0].stride;
    args.state_slots = call.slots;
    args.x = call.inputs[0].data();
    args.outputs = c.outputs;
    args.keep_state = keep_state;
    for (int64_t m = 0; m < c.outputs; ++m) {
      const bool has_delta = m >= c.outputs - c.deltas;
      args.mix[m] = mix[m].data();
      if (has_delta) args.mix_delta[m] = delta[m].data();
      args.y[m] = has_delta && c.in_place ? delta[m].data() : y[m].data();
    }
    const absl::Status status = table.token_shift(args, stream);
    for (int64_t row = 0; row < call.rows; ++row) {
      for (int64_t m = 0; m < c.outputs; ++m) {
        std::copy(args.y[m] + row * c.width, args.y[m] + (row + 1) * c.width, call.y + (row * c.outputs + m) * c.width);
      }
    }
    return status;
  };
  return {c.outputs * c.width, run};
}

class TokenShiftTest : public ::testing::TestWithParam<std::tuple<const OpTable*, Case>> {};

TEST_P(TokenShiftTest, EqualsReference) {
  const auto& [table, c] = GetParam();
  const std::vector<Sequence> sequences = MakeSequences(c);
  const std::vector<SequenceResult> expected = Compute(reference::Table(), MakeRecurrence(c), sequences, c.packing);
  const std::vector<SequenceResult> actual = Compute(*table, MakeRecurrence(c), sequences, c.packing);
  for (size_t s = 0; s < sequences.size(); ++s) {
    // Four roundings of at most |x| + 2 |x| * 1.9, with |x| <= 2.
    EXPECT_TRUE(AllClose(expected[s].y, actual[s].y, 4 * 10.0 * kUnitRoundoff)) << "sequence " << s;
    EXPECT_TRUE(SameBits(expected[s].states[0], actual[s].states[0])) << "sequence " << s;
  }
}

TEST_P(TokenShiftTest, StateIsTheLastInput) {
  const auto& [table, c] = GetParam();
  const std::vector<Sequence> sequences = MakeSequences(c);
  const std::vector<SequenceResult> actual = Compute(*table, MakeRecurrence(c), sequences, c.packing);
  for (size_t s = 0; s < sequences.size(); ++s) {
    const absl::Span<const float> x = sequences[s].inputs[0];
    EXPECT_TRUE(SameBits(x.last(static_cast<size_t>(c.width)), actual[s].states[0]));
  }
}

TEST_P(TokenShiftTest, KeptStateIsWhatItWasAndChangesNoOutput) {
  const auto& [table, c] = GetParam();
  const std::vector<Sequence> sequences = MakeSequences(c);
  const std::vector<SequenceResult> updated = Compute(*table, MakeRecurrence(c), sequences, c.packing);
  const std::vector<SequenceResult> kept = Compute(*table, MakeRecurrence(c, true), sequences, c.packing);
  for (size_t s = 0; s < sequences.size(); ++s) {
    EXPECT_TRUE(SameBits(updated[s].y, kept[s].y)) << "sequence " << s;
    EXPECT_TRUE(SameBits(sequences[s].states[0], kept[s].states[0])) << "sequence " << s;
  }
}

TEST_P(TokenShiftTest, SequenceAloneHasTheBitsOfSequenceAmongOthers) {
  const auto& [table, c] = GetParam();
  ExpectSequencesAreIndependent(*table, MakeRecurrence(c), MakeSequences(c), c.packing);
}

TEST_P(TokenShiftTest, OrderOfTheSequencesIsFree) {
  const auto& [table, c] = GetParam();
  ExpectOrderIsFree(*table, MakeRecurrence(c), MakeSequences(c), c.packing);
}

TEST_P(TokenShiftTest, SplitAtAnyTokenHasTheBitsOfTheWhole) {
  const auto& [table, c] = GetParam();
  ExpectAnySplitIsTheWhole(*table, MakeRecurrence(c), MakeSequences(c));
}

TEST_P(TokenShiftTest, TablesOfOneFamilyGiveTheSameBits) {
  const auto& [table, c] = GetParam();
  ExpectFamilyAgrees(*table, MakeRecurrence(c), MakeSequences(c), c.packing);
}

INSTANTIATE_TEST_SUITE_P(Backends, TokenShiftTest,
                         ::testing::Combine(::testing::ValuesIn(Backends()), ::testing::ValuesIn(Cases())),
                         [](const auto& info) {
                           return TestName(std::get<0>(info.param)) + "_" + std::get<1>(info.param).name;
                         });

class TokenShiftMixTest : public ::testing::TestWithParam<const OpTable*> {};

// RWKV-4 and 5 store the share of the token itself: x m + previous (1 - m) is the shift by 1 - m, rounded once more.
TEST_P(TokenShiftMixTest, OneMinusTheMixOfRwkv4IsItsShift) {
  Random random(67);
  const int64_t width = 4000;
  const Floats x = random.Uniforms(width, -4.0f, 4.0f);
  const Floats previous = random.Uniforms(width, -4.0f, 4.0f);
  const Floats time_mix = random.Uniforms(width, -0.5f, 1.5f);
  Floats mix(time_mix.size());
  for (size_t i = 0; i < mix.size(); ++i) mix[i] = 1.0f - time_mix[i];
  Floats state = previous;
  Floats y(mix.size());
  const SequenceSpan span = {0, 0, 1};
  TokenShiftArgs args;
  args.rows = 1;
  args.width = width;
  args.spans = &span;
  args.span_count = 1;
  args.state_pool = state.data();
  args.state_stride = width;
  args.state_slots = 1;
  args.x = x.data();
  args.outputs = 1;
  args.mix[0] = mix.data();
  args.y[0] = y.data();
  HostStream stream;
  ASSERT_OK(GetParam()->token_shift(args, stream));
  Floats expected(y.size());
  std::vector<double> tolerance(y.size());
  for (size_t i = 0; i < y.size(); ++i) {
    const double m = time_mix[i];
    expected[i] = static_cast<float>(x[i] * m + previous[i] * (1.0 - m));
    tolerance[i] = 4 * kUnitRoundoff * (std::abs(x[i]) + std::abs(previous[i])) * 1.5;
  }
  EXPECT_TRUE(AllClose(expected, y, tolerance));
}

INSTANTIATE_TEST_SUITE_P(Backends, TokenShiftMixTest, ::testing::ValuesIn(Backends()),
                         [](const auto& info) { return TestName(info.param); });

}  // namespace
}  // namespace rwkv::kernels::conformance
