// The RWKV-4 recurrence of every backend against the reference, and its laws.
#include "kernels/api/wkv4.h"

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
  int64_t width = 48;
  float key_range = 3.0f;
  float smallest_decay = -5.0f;
  float largest_decay = -0.001f;
  bool fresh = false;     // states as of a new sequence
  bool in_place = false;  // y is r
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
  add("fresh", [](Case& c) { c.fresh = true; });
  add("one_token", [](Case& c) { c.lengths = {1}, c.packing.slots = {4}; });
  add("long_sequence", [](Case& c) { c.lengths = {150}, c.packing.slots = {1}; });
  add("slots_reversed", [](Case& c) { c.packing.slots = {3, 2, 1}; });
  add("pool_with_gaps", [](Case& c) { c.packing.stride_gap = 13; });
  add("in_place", [](Case& c) { c.in_place = true; });
  // exp() of these keys alone would overflow.
  add("large_keys", [](Case& c) { c.key_range = 200.0f; });
  add("large_keys_fresh", [](Case& c) { c.key_range = 200.0f, c.fresh = true; });
  add("forgets_at_once", [](Case& c) { c.smallest_decay = -2000.0f, c.largest_decay = -300.0f; });
  add("hardly_forgets", [](Case& c) { c.smallest_decay = -1e-6f, c.largest_decay = -1e-9f; });
  for (int64_t width : {1, 15, 16, 17, 40}) {
    add("width_" + std::to_string(width), [=](Case& c) { c.width = width; });
  }
  return cases;
}

struct Problem {
  Floats decay;
  Floats bonus;
  std::vector<Sequence> sequences;  // inputs r, k, v; states aa, bb, pp
};

Problem MakeProblem(const Case& c) {
  Random random(43);
  Problem p;
  p.decay = random.Uniforms(c.width, c.smallest_decay, c.largest_decay);
  p.bonus = random.Uniforms(c.width, -1.0f, 1.0f);
  for (int64_t length : c.lengths) {
    Sequence s;
    s.length = length;
    s.inputs = {random.Uniforms(length * c.width, 0.0f, 1.0f),
                random.Uniforms(length * c.width, -c.key_range, c.key_range),
                random.Uniforms(length * c.width, -2.0f, 2.0f)};
    const Floats mean = random.Uniforms(c.width, -2.0f, 2.0f);
    Floats bb = random.Uniforms(c.width, 0.5f, 3.0f);
    Floats aa(bb.size());
    for (size_t i = 0; i < aa.size(); ++i) aa[i] = mean[i] * bb[i];
    Floats pp = random.Uniforms(c.width, -c.key_range, c.key_range);
    if (c.fresh) {
      std::fill(aa.begin(), aa.end(), 0.0f);
      std::fill(bb.begin(), bb.end(), 0.0f);
      std::fill(pp.begin(), pp.end(), -1e30f);
    }
    s.states = {aa, bb, pp};
    p.sequences.push_back(s);
  }
  return p;
}

Recurrence MakeRecurrence(const Case& c, const Problem& p) {
  const auto run = [&c, &p](const OpTable& table, const PackedCall& call, Stream& stream) {
    Wkv4Args args;
    args.rows = call.rows;
    args.width = c.width;
    args.spans = call.spans.data();
    args.span_count = static_cast<int64_t>(call.spans.size());
    args.state_slots = call.slots;
    args.aa = call.states[0];
    args.bb = call.states[1];
    args.pp = call.states[2];
    args.decay = p.decay.data();
    args.bonus = p.bonus.data();
    args.r = call.inputs[0].data();
    args.k = call.inputs[1].data();
    args.v = call.inputs[2].data();
    args.y = call.y;
    if (c.in_place) {
      std::copy(call.inputs[0].begin(), call.inputs[0].end(), call.y);
      args.r = call.y;
    }
    return table.wkv4(args, stream);
  };
  return {c.width, run};
}

class Wkv4Test : public ::testing::TestWithParam<std::tuple<const OpTable*, Case>> {};

// A token's weight exp(x) in a mean is off by the function and by its argument, whose roundings are relative to the
// exponents it is the difference of. A weight that is old has been multiplied, and is off, once for each token since;
// both sides are, numerator and denominator. Means are of values up to 2. pp is a chain of single additions.
TEST_P(Wkv4Test, EqualsReference) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  const Recurrence recurrence = MakeRecurrence(c, p);
  const std::vector<SequenceResult> expected = Compute(reference::Table(), recurrence, p.sequences, c.packing);
  const std::vector<SequenceResult> actual = Compute(*table, recurrence, p.sequences, c.packing);
  // An exponent below -104 gives a weight of zero on both sides.
  const double largest_exponent = std::min(2.0 * c.key_range + 2 - c.smallest_decay, 110.0) + c.key_range + 1;
  const double weight_error = kUnitRoundoff * (2 * kFunctionUlps + 3 * largest_exponent + 6);
  for (size_t s = 0; s < expected.size(); ++s) {
    const double error = 2 * static_cast<double>(p.sequences[s].length) * weight_error;
    EXPECT_TRUE(AllClose(expected[s].y, actual[s].y, 2 * error * 2.0)) << "sequence " << s;
    std::vector<double> aa_tolerance;
    std::vector<double> bb_tolerance;
    for (float bb : expected[s].states[1]) {
      bb_tolerance.push_back(error * bb);
      aa_tolerance.push_back(error * bb * 2.0);
    }
    EXPECT_TRUE(AllClose(expected[s].states[0], actual[s].states[0], aa_tolerance)) << "sequence " << s;
    EXPECT_TRUE(AllClose(expected[s].states[1], actual[s].states[1], bb_tolerance)) << "sequence " << s;
    EXPECT_TRUE(SameBits(expected[s].states[2], actual[s].states[2])) << "sequence " << s;
  }
}

TEST_P(Wkv4Test, FirstTokenReadsItsOwnValue) {
  const auto& [table, c] = GetParam();
  Problem p = MakeProblem(c);
  for (Sequence& s : p.sequences) {
    s.states = {Floats(s.states[0].size()), Floats(s.states[0].size()), Floats(s.states[0].size(), -1e30f)};
    const SequenceResult result = Compute(*table, MakeRecurrence(c, p), {Slice(s, 0, 1, s.states)}, {{0}, 1, 0})[0];
    for (int64_t i = 0; i < c.width; ++i) {
      EXPECT_EQ(result.y[i], s.inputs[0][i] * s.inputs[2][i]);
      EXPECT_EQ(result.states[0][i], s.inputs[2][i]);
      EXPECT_EQ(result.states[1][i], 1.0f);
      EXPECT_EQ(result.states[2][i], s.inputs[1][i]);
    }
  }
}

TEST_P(Wkv4Test, SequenceAloneHasTheBitsOfSequenceAmongOthers) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  ExpectSequencesAreIndependent(*table, MakeRecurrence(c, p), p.sequences, c.packing);
}

TEST_P(Wkv4Test, OrderOfTheSequencesIsFree) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  ExpectOrderIsFree(*table, MakeRecurrence(c, p), p.sequences, c.packing);
}

TEST_P(Wkv4Test, SplitAtAnyTokenHasTheBitsOfTheWhole) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  ExpectAnySplitIsTheWhole(*table, MakeRecurrence(c, p), p.sequences);
}

TEST_P(Wkv4Test, TablesOfOneFamilyGiveTheSameBits) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  ExpectFamilyAgrees(*table, MakeRecurrence(c, p), p.sequences, c.packing);
}

INSTANTIATE_TEST_SUITE_P(Backends, Wkv4Test,
                         ::testing::Combine(::testing::ValuesIn(Backends()), ::testing::ValuesIn(Cases())),
                         [](const auto& info) {
                           return TestName(std::get<0>(info.param)) + "_" + std::get<1>(info.param).name;
                         });

}  // namespace
}  // namespace rwkv::kernels::conformance
