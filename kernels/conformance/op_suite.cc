#include "kernels/conformance/op_suite.h"

#include <algorithm>
#include <utility>

#include "kernels/base/device.h"
#include "kernels/conformance/conformance.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::conformance {
namespace {

constexpr float kUntouched = 1234.5f;

int64_t Size(const Floats& floats) { return static_cast<int64_t>(floats.size()); }

// Tokens [begin, end) of a sequence, from `states` on.
Sequence Slice(const Sequence& sequence, int64_t begin, int64_t end, const std::vector<Floats>& states) {
  Sequence slice;
  slice.length = end - begin;
  for (const Floats& input : sequence.inputs) {
    const int64_t width = Size(input) / sequence.length;
    slice.inputs.emplace_back(input.begin() + begin * width, input.begin() + end * width);
  }
  if (!sequence.tokens.empty()) slice.tokens.assign(sequence.tokens.begin() + begin, sequence.tokens.begin() + end);
  slice.states = states;
  return slice;
}

void ExpectSame(const SequenceResult& expected, const SequenceResult& actual, const std::string& what) {
  EXPECT_TRUE(SameBits(expected.y, actual.y)) << what;
  for (size_t i = 0; i < expected.states.size(); ++i) {
    EXPECT_TRUE(SameBits(expected.states[i], actual.states[i])) << what << ", state " << i;
  }
}

}  // namespace

::testing::AssertionResult Within(const Bounds& expected, const Floats& actual) {
  Floats values;
  std::vector<double> errors;
  for (const Bounded& bounded : expected) {
    values.push_back(static_cast<float>(bounded.value));
    errors.push_back(bounded.error + kUnitRoundoff * std::abs(bounded.value));  // of narrowing to float
  }
  return AllClose(values, actual, errors);
}

std::string OpTestName(const ::testing::TestParamInfo<OpTest::ParamType>& info) {
  return TestName(std::get<0>(info.param)) + "_" + std::get<1>(info.param)->name;
}

std::vector<SequenceResult> Compute(const std::string& backend, const OpCase& op,
                                    const std::vector<Sequence>& sequences, const Packing& packing) {
  DeviceMemory memory(OpenedDevice(backend));
  const Sequence& first = sequences.front();
  std::vector<Floats> inputs(first.inputs.size());
  std::vector<int64_t> lengths;
  std::vector<int32_t> tokens;
  std::vector<bool> is_padding;
  for (const Sequence& sequence : sequences) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      inputs[i].insert(inputs[i].end(), sequence.inputs[i].begin(), sequence.inputs[i].end());
    }
    lengths.push_back(sequence.length);
    tokens.insert(tokens.end(), sequence.tokens.begin(), sequence.tokens.end());
    if (sequence.tokens.empty()) tokens.resize(tokens.size() + sequence.length);
    is_padding.resize(tokens.size(), packing.slots[lengths.size() - 1] == kPaddingSlot);
  }
  const std::vector<SequenceSpan> spans = PackSpans(lengths, packing.slots);
  const auto rows = static_cast<int64_t>(tokens.size());
  OpCall call;
  call.is_padding = is_padding;
  call.step = {rows, static_cast<int64_t>(spans.size()), memory.Put(absl::MakeConstSpan(spans)),
               memory.Put(absl::MakeConstSpan(tokens))};
  for (const Floats& input : inputs) call.inputs.push_back(memory.Put(input));
  std::vector<Floats> pools;
  for (size_t i = 0; i < first.states.size(); ++i) {
    const int64_t stride = Size(first.states[i]) + packing.stride_gap;
    pools.emplace_back(static_cast<size_t>(packing.slot_count * stride), kUntouched);
    for (size_t s = 0; s < sequences.size(); ++s) {
      if (packing.slots[s] == kPaddingSlot) continue;
      std::copy(sequences[s].states[i].begin(), sequences[s].states[i].end(),
                pools.back().begin() + packing.slots[s] * stride);
    }
    call.states.push_back({memory.Put(pools.back()), stride});
  }
  call.y = memory.Unwritten(rows * op.y_width);
  EXPECT_OK(op.run(memory, call));
  const Floats y = memory.Get(call.y, rows * op.y_width);
  for (size_t i = 0; i < pools.size(); ++i) pools[i] = memory.Get(call.states[i].data, Size(pools[i]));

  std::vector<SequenceResult> results;
  for (size_t s = 0; s < sequences.size(); ++s) {
    SequenceResult result;
    const auto begin = y.begin() + spans[s].row_begin * op.y_width;
    result.y.assign(begin, begin + spans[s].row_count * op.y_width);
    for (size_t i = 0; i < pools.size() && packing.slots[s] != kPaddingSlot; ++i) {
      const auto state = pools[i].begin() + packing.slots[s] * call.states[i].stride;
      const int64_t size = Size(sequences[s].states[i]);
      result.states.emplace_back(state, state + size);
      std::fill(state, state + size, kUntouched);
    }
    results.push_back(result);
  }
  for (const Floats& pool : pools) {
    EXPECT_EQ(std::count(pool.begin(), pool.end(), kUntouched), Size(pool))
        << "wrote outside the states of its sequences";
  }
  return results;
}

// Row by row, each from the state that the backend itself has come to: errors do not add up, so that the tolerance is
// that of one row. That many rows are as good as one by one is a law below.
TEST_P(OpTest, EqualsTheFormula) {
  const auto& [backend, op] = GetParam();
  for (size_t s = 0; s < op->sequences.size(); ++s) {
    std::vector<Floats> states = op->sequences[s].states;
    for (int64_t t = 0; t < op->sequences[s].length && !HasFailure(); ++t) {
      const Sequence row = Slice(op->sequences[s], t, t + 1, states);
      const SequenceResult actual = Compute(backend, *op, {row}, {{0}, 1, 0})[0];
      const RowResult expected = op->formula(row);
      EXPECT_TRUE(Within(expected.y, actual.y)) << "sequence " << s << ", row " << t;
      ASSERT_EQ(expected.states.size(), actual.states.size());
      for (size_t i = 0; i < states.size(); ++i) {
        EXPECT_TRUE(Within(expected.states[i], actual.states[i]))
            << "sequence " << s << ", row " << t << ", state " << i;
      }
      states = actual.states;
    }
  }
}

TEST_P(OpTest, SequenceAloneHasTheBitsOfSequenceAmongOthers) {
  const auto& [backend, op] = GetParam();
  const std::vector<SequenceResult> together = Compute(backend, *op, op->sequences, op->packing);
  for (size_t s = 0; s < together.size(); ++s) {
    ExpectSame(together[s], Compute(backend, *op, {op->sequences[s]}, {{0}, 1, 0})[0], "sequence " + std::to_string(s));
  }
}

TEST_P(OpTest, OrderOfTheSequencesIsFree) {
  const auto& [backend, op] = GetParam();
  const std::vector<SequenceResult> forward = Compute(backend, *op, op->sequences, op->packing);
  const std::vector<SequenceResult> backward =
      Compute(backend, *op, {op->sequences.rbegin(), op->sequences.rend()}, op->packing);
  for (size_t s = 0; s < forward.size(); ++s) {
    ExpectSame(forward[s], backward[forward.size() - 1 - s], "sequence " + std::to_string(s));
  }
}

TEST_P(OpTest, SplitAtAnyTokenHasTheBitsOfTheWhole) {
  const auto& [backend, op] = GetParam();
  if (op->keeps_state) GTEST_SKIP() << "the operation keeps its states";
  for (const Sequence& sequence : op->sequences) {
    const SequenceResult whole = Compute(backend, *op, {sequence}, {{1}, 2, 0})[0];
    const int64_t step = sequence.length > 20 ? 37 : 1;
    for (int64_t split = 1; split < sequence.length; split += step) {
      const Sequence head = Slice(sequence, 0, split, sequence.states);
      SequenceResult joined = Compute(backend, *op, {head}, {{1}, 2, 0})[0];
      const Sequence tail = Slice(sequence, split, sequence.length, joined.states);
      const SequenceResult second = Compute(backend, *op, {tail}, {{0}, 2, 0})[0];
      joined.y.insert(joined.y.end(), second.y.begin(), second.y.end());
      joined.states = second.states;
      ExpectSame(whole, joined, "split at " + std::to_string(split));
    }
  }
}

// Rows of nobody before, between and behind the sequences change nothing; where there are states, they give zeros.
TEST_P(OpTest, PaddingChangesNothing) {
  const auto& [backend, op] = GetParam();
  const std::vector<SequenceResult> plain = Compute(backend, *op, op->sequences, op->packing);
  std::vector<Sequence> padded;
  Packing packing = op->packing;
  packing.slots.clear();
  const auto pad = [&, op = op](int64_t length) {
    const Sequence& model = op->sequences.front();
    Sequence padding = Slice(model, 0, 1, model.states);
    while (padding.length < length) {
      for (size_t i = 0; i < padding.inputs.size(); ++i) {
        const int64_t width = Size(model.inputs[i]) / model.length;
        padding.inputs[i].insert(padding.inputs[i].end(), model.inputs[i].begin(), model.inputs[i].begin() + width);
      }
      if (!model.tokens.empty()) padding.tokens.push_back(model.tokens[0]);
      ++padding.length;
    }
    padded.push_back(padding);
    packing.slots.push_back(kPaddingSlot);
  };
  pad(1);
  for (size_t s = 0; s < plain.size(); ++s) {
    padded.push_back(op->sequences[s]);
    packing.slots.push_back(op->packing.slots[s]);
    pad(static_cast<int64_t>(s) + 1);
  }
  const std::vector<SequenceResult> actual = Compute(backend, *op, padded, packing);
  for (size_t s = 0; s < plain.size(); ++s) ExpectSame(plain[s], actual[2 * s + 1], "sequence " + std::to_string(s));
  for (size_t p = 0; p < actual.size() && !op->sequences.front().states.empty(); p += 2) {
    EXPECT_TRUE(SameBits(Floats(actual[p].y.size()), actual[p].y)) << "padding " << p;
  }
}

// What a numeric family promises: a sequence may move between machines and numbers of threads.
TEST_P(OpTest, DevicesOfOneFamilyGiveTheSameBits) {
  const auto& [backend, op] = GetParam();
  const std::vector<SequenceResult> mine = Compute(backend, *op, op->sequences, op->packing);
  for (const std::string& other : Backends()) {
    if (other == backend || OpenedDevice(other).numeric_family() != OpenedDevice(backend).numeric_family()) continue;
    const std::vector<SequenceResult> theirs = Compute(other, *op, op->sequences, op->packing);
    for (size_t s = 0; s < mine.size(); ++s) ExpectSame(mine[s], theirs[s], other + ", sequence " + std::to_string(s));
  }
}

}  // namespace rwkv::kernels::conformance
