// The recurrence of RWKV-5 and 6 of every backend against the reference, and its laws.
#include "kernels/api/wkv6.h"

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
  bool constant_decay = false;
  float smallest_decay = 0.0f;  // e^-20 a step is legal, so zero is
  float largest_decay = 1.0f;
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
  add("constant_decay", [](Case& c) { c.constant_decay = true; });
  add("one_token", [](Case& c) { c.lengths = {1}, c.packing.slots = {4}; });
  add("one_sequence_odd_tokens", [](Case& c) { c.lengths = {7}, c.packing.slots = {1}; });
  add("long_sequence", [](Case& c) { c.lengths = {150}, c.packing.slots = {1}, c.heads = 1; });
  add("one_head", [](Case& c) { c.heads = 1; });
  add("three_heads_constant_decay", [](Case& c) { c.heads = 3, c.constant_decay = true; });
  add("slots_reversed", [](Case& c) { c.packing.slots = {3, 2, 1}; });
  add("pool_with_gaps", [](Case& c) { c.packing.stride_gap = 77; });
  add("forgets_at_once", [](Case& c) { c.largest_decay = 0.0f; });
  add("never_forgets", [](Case& c) { c.smallest_decay = 1.0f; });
  for (int64_t head_size : {1, 2, 3, 5, 8, 15, 16, 17, 32, 33, 63, 65, 128}) {
    add("head_size_" + std::to_string(head_size), [=](Case& c) { c.head_size = head_size; });
  }
  return cases;
}

struct Problem {
  Floats bonus;
  Floats decay;                     // [H, N], if it is constant
  std::vector<Sequence> sequences;  // inputs r, w, k, v
};

Problem MakeProblem(const Case& c) {
  Random random(47);
  const int64_t width = c.heads * c.head_size;
  Problem p;
  p.bonus = random.Uniforms(width, -1.0f, 1.0f);
  p.decay = random.Uniforms(width, c.smallest_decay, c.largest_decay);
  for (int64_t length : c.lengths) {
    Sequence s;
    s.length = length;
    s.inputs.push_back(random.Uniforms(length * width, -1.0f, 1.0f));
    s.inputs.push_back(random.Uniforms(length * width, c.smallest_decay, c.largest_decay));
    s.inputs.push_back(random.Uniforms(length * width, -1.0f, 1.0f));
    s.inputs.push_back(random.Uniforms(length * width, -1.0f, 1.0f));
    s.states.push_back(random.Uniforms(width * c.head_size, -0.5f, 0.5f));
    p.sequences.push_back(s);
  }
  return p;
}

Recurrence MakeRecurrence(const Case& c, const Problem& p) {
  const auto run = [&c, &p](const OpTable& table, const PackedCall& call, Stream& stream) {
    Wkv6Args args;
    args.rows = call.rows;
    args.heads = c.heads;
    args.head_size = c.head_size;
    args.spans = call.spans.data();
    args.span_count = static_cast<int64_t>(call.spans.size());
    args.state_pool = call.states[0].data;
    args.state_stride = call.states[0].stride;
    args.state_slots = call.slots;
    args.r = call.inputs[0].data();
    args.w = c.constant_decay ? p.decay.data() : call.inputs[1].data();
    args.constant_decay = c.constant_decay;
    args.k = call.inputs[2].data();
    args.v = call.inputs[3].data();
    args.bonus = p.bonus.data();
    args.y = call.y;
    return table.wkv6(args, stream);
  };
  return {c.heads * c.head_size, run};
}

class Wkv6Test : public ::testing::TestWithParam<std::tuple<const OpTable*, Case>> {};

// All inputs are at most 1 in size. An element of the state is at most 0.5 + T, and each token rounds it three times;
// what was off before does not grow, as w <= 1. A read is a sum of N products with it, the bonus another. Both sides.
TEST_P(Wkv6Test, EqualsReference) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  const Recurrence recurrence = MakeRecurrence(c, p);
  const std::vector<SequenceResult> expected = Compute(reference::Table(), recurrence, p.sequences, c.packing);
  const std::vector<SequenceResult> actual = Compute(*table, recurrence, p.sequences, c.packing);
  const auto n = static_cast<double>(c.head_size);
  for (size_t s = 0; s < expected.size(); ++s) {
    const auto tokens = static_cast<double>(p.sequences[s].length);
    const double largest_state = 0.5 + tokens;
    const double state_tolerance = 2 * tokens * 3 * kUnitRoundoff * (largest_state + 1);
    const double sum_roundings = 2 * (n + n / 16 + 10) * kUnitRoundoff;
    const double y_tolerance = n * state_tolerance + sum_roundings * (n * largest_state + n);
    EXPECT_TRUE(AllClose(expected[s].y, actual[s].y, y_tolerance)) << "sequence " << s;
    EXPECT_TRUE(AllClose(expected[s].states[0], actual[s].states[0], state_tolerance)) << "sequence " << s;
  }
}

TEST_P(Wkv6Test, ConstantDecayHasTheBitsOfTheSameDecayInEveryRow) {
  const auto& [table, c] = GetParam();
  Problem p = MakeProblem(c);
  for (Sequence& s : p.sequences) {
    s.inputs[1].clear();
    for (int64_t t = 0; t < s.length; ++t) s.inputs[1].insert(s.inputs[1].end(), p.decay.begin(), p.decay.end());
  }
  Case other = c;
  other.constant_decay = !c.constant_decay;
  const std::vector<SequenceResult> a = Compute(*table, MakeRecurrence(c, p), p.sequences, c.packing);
  const std::vector<SequenceResult> b = Compute(*table, MakeRecurrence(other, p), p.sequences, c.packing);
  for (size_t s = 0; s < a.size(); ++s) {
    EXPECT_TRUE(SameBits(a[s].y, b[s].y)) << "sequence " << s;
    EXPECT_TRUE(SameBits(a[s].states[0], b[s].states[0])) << "sequence " << s;
  }
}

TEST_P(Wkv6Test, SequenceAloneHasTheBitsOfSequenceAmongOthers) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  ExpectSequencesAreIndependent(*table, MakeRecurrence(c, p), p.sequences, c.packing);
}

TEST_P(Wkv6Test, OrderOfTheSequencesIsFree) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  ExpectOrderIsFree(*table, MakeRecurrence(c, p), p.sequences, c.packing);
}

TEST_P(Wkv6Test, SplitAtAnyTokenHasTheBitsOfTheWhole) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  ExpectAnySplitIsTheWhole(*table, MakeRecurrence(c, p), p.sequences);
}

TEST_P(Wkv6Test, TablesOfOneFamilyGiveTheSameBits) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  ExpectFamilyAgrees(*table, MakeRecurrence(c, p), p.sequences, c.packing);
}

INSTANTIATE_TEST_SUITE_P(Backends, Wkv6Test,
                         ::testing::Combine(::testing::ValuesIn(Backends()), ::testing::ValuesIn(Cases())),
                         [](const auto& info) {
                           return TestName(std::get<0>(info.param)) + "_" + std::get<1>(info.param).name;
                         });

}  // namespace
}  // namespace rwkv::kernels::conformance
