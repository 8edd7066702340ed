// The RWKV-7 recurrence of every backend against the reference, and its laws.
#include "kernels/api/wkv7.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/api/op_table.h"
#include "kernels/base/stream.h"
#include "kernels/conformance/conformance.h"
#include "kernels/conformance/recurrence.h"
#include "kernels/reference/reference.h"

namespace rwkv::kernels::conformance {
namespace {

struct Case {
  std::string name;
  std::vector<int64_t> lengths = {3, 1, 5};
  Packing packing = {{2, 0, 3}, 5, 0};
  int64_t heads = 2;
  int64_t head_size = 64;
  bool zero_key = false;  // kappa_hat = 0 and k = 0
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
  add("one_sequence_odd_tokens", [](Case& c) { c.lengths = {7}, c.packing.slots = {1}; });
  add("long_sequence", [](Case& c) { c.lengths = {150}, c.packing.slots = {1}, c.heads = 1; });
  add("one_head", [](Case& c) { c.heads = 1; });
  add("three_heads", [](Case& c) { c.heads = 3; });
  add("slots_reversed", [](Case& c) { c.packing.slots = {3, 2, 1}; });
  add("pool_with_gaps", [](Case& c) { c.packing.stride_gap = 77; });
  add("zero_key", [](Case& c) { c.zero_key = true; });
  for (int64_t head_size : {1, 2, 3, 5, 8, 15, 16, 17, 32, 33, 48, 63, 65, 128}) {
    add("head_size_" + std::to_string(head_size), [=](Case& c) { c.head_size = head_size; });
  }
  return cases;
}

// Inputs: r, w, k, v, a, b, each [length, H, N]. One state [H, N, N].
std::vector<Sequence> MakeSequences(const Case& c) {
  Random random(19);
  const int64_t n = c.head_size;
  std::vector<Sequence> sequences;
  for (int64_t length : c.lengths) {
    const int64_t count = length * c.heads * n;
    Sequence s;
    s.length = length;
    s.inputs.resize(6);
    s.inputs[0] = random.Uniforms(count, -1.0f, 1.0f);
    s.inputs[1] = random.Uniforms(count, 0.5453f, 1.0f);
    s.inputs[2] = c.zero_key ? Floats(static_cast<size_t>(count)) : random.Uniforms(count, -1.0f, 1.0f);
    s.inputs[3] = random.Uniforms(count, -1.0f, 1.0f);
    // a = -kappa_hat with |kappa_hat| = 1 per head, b = kappa_hat * iclr.
    Floats& a = s.inputs[4] = random.Uniforms(count, -1.0f, 1.0f);
    s.inputs[5].resize(a.size());
    for (int64_t head = 0; head < length * c.heads; ++head) {
      double squares = 0.0;
      for (int64_t j = 0; j < n; ++j) squares += static_cast<double>(a[head * n + j]) * a[head * n + j];
      for (int64_t j = 0; j < n; ++j) {
        float& element = a[head * n + j];
        element = c.zero_key ? 0.0f : static_cast<float>(element / std::sqrt(squares));
        s.inputs[5][head * n + j] = -element * random.Uniform(0.0f, 1.0f);
      }
    }
    s.states.push_back(random.Uniforms(c.heads * n * n, -0.5f, 0.5f));
    sequences.push_back(s);
  }
  return sequences;
}

Recurrence MakeRecurrence(const Case& c) {
  const auto run = [&c](const OpTable& table, const PackedCall& call, Stream& stream) {
    Wkv7Args args;
    args.rows = call.rows;
    args.heads = c.heads;
    args.head_size = c.head_size;
    args.spans = call.spans.data();
    args.span_count = static_cast<int64_t>(call.spans.size());
    args.state_pool = call.states[0].data;
    args.state_stride = call.states[0].stride;
    args.state_slots = call.slots;
    args.r = call.inputs[0].data();
    args.w = call.inputs[1].data();
    args.k = call.inputs[2].data();
    args.v = call.inputs[3].data();
    args.a = call.inputs[4].data();
    args.b = call.inputs[5].data();
    args.y = call.y;
    return table.wkv7(args, stream);
  };
  return {c.heads * c.head_size, run};
}

struct Tolerances {
  double y;
  double state;
};

// Each token adds to an element of the state at most the error of the recall, a sum of N products, and a few roundings
// of the element itself; what was off before does not grow, as diag(w) - kappa_hat b^T shrinks. Both sides are off.
Tolerances ToleranceOf(const Case& c, const Sequence& sequence) {
  const int64_t n = c.head_size;
  double largest_state = 0.0;   // max |S|
  double largest_recall = 0.0;  // max over rows of sum_j |S_j a_j|
  double largest_read = 0.0;    // max over rows of sum_j |S_j r_j|
  double largest_reader = 0.0;  // max over heads of sum_j |r_j|
  Floats state = sequence.states[0];
  for (int64_t t = 0; t < sequence.length; ++t) {
    const Sequence one = Slice(sequence, t, t + 1, {state});
    const Floats next = Compute(reference::Table(), MakeRecurrence(c), {one}, {{0}, 1, 0})[0].states[0];
    for (int64_t row = 0; row < c.heads * n; ++row) {
      double recall = 0.0;
      double read = 0.0;
      double reader = 0.0;
      for (int64_t j = 0; j < n; ++j) {
        const int64_t at = row / n * n + j;
        largest_state = std::max<double>(largest_state, std::abs(next[row * n + j]));
        recall += std::abs(static_cast<double>(state[row * n + j]) * one.inputs[4][at]);
        read += std::abs(static_cast<double>(next[row * n + j]) * one.inputs[0][at]);
        reader += std::abs(static_cast<double>(one.inputs[0][at]));
      }
      largest_recall = std::max(largest_recall, recall);
      largest_read = std::max(largest_read, read);
      largest_reader = std::max(largest_reader, reader);
    }
    state = next;
  }
  const double sum_length = static_cast<double>(n) + static_cast<double>(n) / 16 + 8;
  Tolerances tolerances;
  // |v k| <= 1
  tolerances.state = static_cast<double>(sequence.length) * kUnitRoundoff *
                     (sum_length * largest_recall + 8 * (largest_state + largest_recall + 1));
  tolerances.y = tolerances.state * largest_reader + sum_length * kUnitRoundoff * largest_read;
  return tolerances;
}

class Wkv7Test : public ::testing::TestWithParam<std::tuple<const OpTable*, Case>> {};

TEST_P(Wkv7Test, EqualsReference) {
  const auto& [table, c] = GetParam();
  const std::vector<Sequence> sequences = MakeSequences(c);
  const std::vector<SequenceResult> expected = Compute(reference::Table(), MakeRecurrence(c), sequences, c.packing);
  const std::vector<SequenceResult> actual = Compute(*table, MakeRecurrence(c), sequences, c.packing);
  for (size_t s = 0; s < sequences.size(); ++s) {
    const Tolerances tolerances = ToleranceOf(c, sequences[s]);
    EXPECT_TRUE(AllClose(expected[s].y, actual[s].y, tolerances.y)) << "sequence " << s;
    EXPECT_TRUE(AllClose(expected[s].states[0], actual[s].states[0], tolerances.state)) << "sequence " << s;
  }
}

TEST_P(Wkv7Test, SequenceAloneHasTheBitsOfSequenceAmongOthers) {
  const auto& [table, c] = GetParam();
  ExpectSequencesAreIndependent(*table, MakeRecurrence(c), MakeSequences(c), c.packing);
}

TEST_P(Wkv7Test, OrderOfTheSequencesIsFree) {
  const auto& [table, c] = GetParam();
  ExpectOrderIsFree(*table, MakeRecurrence(c), MakeSequences(c), c.packing);
}

TEST_P(Wkv7Test, SplitAtAnyTokenHasTheBitsOfTheWhole) {
  const auto& [table, c] = GetParam();
  ExpectAnySplitIsTheWhole(*table, MakeRecurrence(c), MakeSequences(c));
}

TEST_P(Wkv7Test, TablesOfOneFamilyGiveTheSameBits) {
  const auto& [table, c] = GetParam();
  ExpectFamilyAgrees(*table, MakeRecurrence(c), MakeSequences(c), c.packing);
}

INSTANTIATE_TEST_SUITE_P(Backends, Wkv7Test,
                         ::testing::Combine(::testing::ValuesIn(Backends()), ::testing::ValuesIn(Cases())),
                         [](const auto& info) {
                           return TestName(std::get<0>(info.param)) + "_" + std::get<1>(info.param).name;
                         });

}  // namespace
}  // namespace rwkv::kernels::conformance
