#include "kernels/conformance/recurrence.h"

#include <algorithm>

#include "gtest/gtest.h"
#include "kernels/base/host_device.h"
#include "kernels/conformance/conformance.h"

namespace rwkv::kernels::conformance {
namespace {

constexpr float kUntouched = 1234.5f;

int64_t Size(const Floats& floats) { return static_cast<int64_t>(floats.size()); }

void ExpectSame(const SequenceResult& expected, const SequenceResult& actual, const char* what, int64_t at) {
  EXPECT_TRUE(SameBits(expected.y, actual.y)) << what << " " << at;
  for (size_t i = 0; i < expected.states.size(); ++i) {
    EXPECT_TRUE(SameBits(expected.states[i], actual.states[i])) << what << " " << at << ", state " << i;
  }
}

}  // namespace

std::vector<SequenceResult> Compute(const OpTable& table, const Recurrence& recurrence,
                                    const std::vector<Sequence>& sequences, const Packing& packing) {
  const Sequence& first = sequences.front();
  PackedCall call;
  call.slots = packing.slot_count;
  call.inputs.resize(first.inputs.size());
  std::vector<int64_t> lengths;
  for (const Sequence& sequence : sequences) {
    for (size_t i = 0; i < call.inputs.size(); ++i) {
      call.inputs[i].insert(call.inputs[i].end(), sequence.inputs[i].begin(), sequence.inputs[i].end());
    }
    lengths.push_back(sequence.length);
    call.rows += sequence.length;
  }
  call.spans = PackSpans(lengths, packing.slots);
  std::vector<Floats> pools;
  for (const Floats& state : first.states) {
    const int64_t stride = Size(state) + packing.stride_gap;
    pools.emplace_back(static_cast<size_t>(packing.slot_count * stride), kUntouched);
    call.states.push_back({pools.back().data(), stride});
  }
  for (size_t s = 0; s < sequences.size(); ++s) {
    for (size_t i = 0; i < pools.size(); ++i) {
      const Floats& state = sequences[s].states[i];
      std::copy(state.begin(), state.end(), pools[i].begin() + packing.slots[s] * call.states[i].stride);
    }
  }
  Floats y(static_cast<size_t>(call.rows * recurrence.y_width));
  call.y = y.data();
  HostStream stream;
  const absl::Status status = recurrence.run(table, call, stream);
  EXPECT_TRUE(status.ok()) << status;

  std::vector<SequenceResult> results;
  for (size_t s = 0; s < sequences.size(); ++s) {
    SequenceResult result;
    const auto begin = y.begin() + call.spans[s].row_begin * recurrence.y_width;
    result.y.assign(begin, begin + call.spans[s].row_count * recurrence.y_width);
    for (size_t i = 0; i < pools.size(); ++i) {
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

Sequence Slice(const Sequence& sequence, int64_t begin, int64_t end, const std::vector<Floats>& states) {
  Sequence slice;
  slice.length = end - begin;
  for (const Floats& input : sequence.inputs) {
    const int64_t width = Size(input) / sequence.length;
    slice.inputs.emplace_back(input.begin() + begin * width, input.begin() + end * width);
  }
  slice.states = states;
  return slice;
}

void ExpectSequencesAreIndependent(const OpTable& table, const Recurrence& recurrence,
                                   const std::vector<Sequence>& sequences, const Packing& packing) {
  const std::vector<SequenceResult> together = Compute(table, recurrence, sequences, packing);
  for (size_t s = 0; s < sequences.size(); ++s) {
    ExpectSame(together[s], Compute(table, recurrence, {sequences[s]}, {{0}, 1, 0})[0], "sequence", s);
  }
}

void ExpectOrderIsFree(const OpTable& table, const Recurrence& recurrence, const std::vector<Sequence>& sequences,
                       const Packing& packing) {
  const std::vector<SequenceResult> forward = Compute(table, recurrence, sequences, packing);
  const std::vector<SequenceResult> backward =
      Compute(table, recurrence, {sequences.rbegin(), sequences.rend()}, packing);
  for (size_t s = 0; s < sequences.size(); ++s) {
    ExpectSame(forward[s], backward[sequences.size() - 1 - s], "sequence", s);
  }
}

void ExpectAnySplitIsTheWhole(const OpTable& table, const Recurrence& recurrence,
                              const std::vector<Sequence>& sequences) {
  for (const Sequence& sequence : sequences) {
    const SequenceResult whole = Compute(table, recurrence, {sequence}, {{1}, 2, 0})[0];
    const int64_t step = sequence.length > 20 ? 37 : 1;
    for (int64_t split = 1; split < sequence.length; split += step) {
      const Sequence head = Slice(sequence, 0, split, sequence.states);
      SequenceResult joined = Compute(table, recurrence, {head}, {{1}, 2, 0})[0];
      const Sequence tail = Slice(sequence, split, sequence.length, joined.states);
      const SequenceResult second = Compute(table, recurrence, {tail}, {{0}, 2, 0})[0];
      joined.y.insert(joined.y.end(), second.y.begin(), second.y.end());
      joined.states = second.states;
      ExpectSame(whole, joined, "split at", split);
    }
  }
}

void ExpectFamilyAgrees(const OpTable& table, const Recurrence& recurrence, const std::vector<Sequence>& sequences,
                        const Packing& packing) {
  const std::vector<SequenceResult> mine = Compute(table, recurrence, sequences, packing);
  for (const OpTable* other : Backends()) {
    if (other->numeric_family != table.numeric_family) continue;
    const std::vector<SequenceResult> theirs = Compute(*other, recurrence, sequences, packing);
    for (size_t s = 0; s < sequences.size(); ++s) ExpectSame(mine[s], theirs[s], "sequence", s);
  }
}

}  // namespace rwkv::kernels::conformance
