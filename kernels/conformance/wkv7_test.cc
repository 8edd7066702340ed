// The RWKV-7 recurrence of every backend against the reference, and its laws.
#include "kernels/api/wkv7.h"

#include <algorithm>
#include <cmath>
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
  std::vector<int64_t> lengths = {3, 1, 5};
  std::vector<int32_t> slots = {2, 0, 3};
  int64_t slot_count = 5;
  int64_t heads = 2;
  int64_t head_size = 64;
  int64_t stride_gap = 0;
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
  add("one_token", [](Case& c) { c.lengths = {1}, c.slots = {4}; });
  add("one_sequence_odd_tokens", [](Case& c) { c.lengths = {7}, c.slots = {1}; });
  add("long_sequence", [](Case& c) { c.lengths = {150}, c.slots = {1}, c.heads = 1; });
  add("one_head", [](Case& c) { c.heads = 1; });
  add("three_heads", [](Case& c) { c.heads = 3; });
  add("slots_reversed", [](Case& c) { c.slots = {3, 2, 1}; });
  add("pool_with_gaps", [](Case& c) { c.stride_gap = 77; });
  add("zero_key", [](Case& c) { c.zero_key = true; });
  for (int64_t head_size : {1, 2, 3, 5, 8, 15, 16, 17, 32, 33, 48, 63, 65, 128}) {
    add("head_size_" + std::to_string(head_size), [=](Case& c) { c.head_size = head_size; });
  }
  return cases;
}

// r, w, k, v, a, b, each [length, H, N].
constexpr int kInputs = 6;
struct Sequence {
  int64_t length;
  std::vector<float> input[kInputs];
  std::vector<float> state;  // [H, N, N]
};

struct Result {
  std::vector<std::vector<float>> y;
  std::vector<std::vector<float>> state;
};

std::vector<Sequence> MakeSequences(const Case& c) {
  Random random(19);
  const int64_t n = c.head_size;
  std::vector<Sequence> sequences;
  for (int64_t length : c.lengths) {
    const int64_t count = length * c.heads * n;
    Sequence s;
    s.length = length;
    s.input[0] = random.Uniforms(count, -1.0f, 1.0f);
    s.input[1] = random.Uniforms(count, 0.5453f, 1.0f);
    s.input[2] = c.zero_key ? std::vector<float>(static_cast<size_t>(count)) : random.Uniforms(count, -1.0f, 1.0f);
    s.input[3] = random.Uniforms(count, -1.0f, 1.0f);
    // a = -kappa_hat with |kappa_hat| = 1 per head, b = kappa_hat * iclr.
    std::vector<float>& a = s.input[4] = random.Uniforms(count, -1.0f, 1.0f);
    s.input[5].resize(a.size());
    for (int64_t head = 0; head < length * c.heads; ++head) {
      double squares = 0.0;
      for (int64_t j = 0; j < n; ++j) squares += static_cast<double>(a[head * n + j]) * a[head * n + j];
      for (int64_t j = 0; j < n; ++j) {
        float& element = a[head * n + j];
        element = c.zero_key ? 0.0f : static_cast<float>(element / std::sqrt(squares));
        s.input[5][head * n + j] = -element * random.Uniform(0.0f, 1.0f);
      }
    }
    s.state = random.Uniforms(c.heads * n * n, -0.5f, 0.5f);
    sequences.push_back(s);
  }
  return sequences;
}

Result Compute(Wkv7Op* op, const Case& c, const std::vector<Sequence>& sequences, const std::vector<int32_t>& slots) {
  const int64_t width = c.heads * c.head_size;
  const int64_t state_size = width * c.head_size;
  const int64_t stride = state_size + c.stride_gap;
  std::vector<float> pool(static_cast<size_t>(c.slot_count * stride), kUntouched);
  std::vector<float> input[kInputs];
  std::vector<int64_t> lengths;
  for (size_t i = 0; i < sequences.size(); ++i) {
    for (int in = 0; in < kInputs; ++in) {
      input[in].insert(input[in].end(), sequences[i].input[in].begin(), sequences[i].input[in].end());
    }
    lengths.push_back(sequences[i].length);
    std::copy(sequences[i].state.begin(), sequences[i].state.end(), pool.begin() + slots[i] * stride);
  }
  const std::vector<SequenceSpan> spans = PackSpans(lengths, slots);
  std::vector<float> y(input[0].size());
  Wkv7Args args;
  args.rows = static_cast<int64_t>(y.size()) / width;
  args.heads = c.heads;
  args.head_size = c.head_size;
  args.spans = spans.data();
  args.span_count = static_cast<int64_t>(spans.size());
  args.state_pool = pool.data();
  args.state_stride = stride;
  args.state_slots = c.slot_count;
  args.r = input[0].data();
  args.w = input[1].data();
  args.k = input[2].data();
  args.v = input[3].data();
  args.a = input[4].data();
  args.b = input[5].data();
  args.y = y.data();
  CpuStream stream;
  EXPECT_OK(op(args, stream));

  Result result;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const auto begin = y.begin() + spans[i].row_begin * width;
    result.y.emplace_back(begin, begin + spans[i].row_count * width);
    const auto state = pool.begin() + slots[i] * stride;
    result.state.emplace_back(state, state + state_size);
    std::fill(state, state + state_size, kUntouched);
  }
  EXPECT_EQ(std::count(pool.begin(), pool.end(), kUntouched), static_cast<int64_t>(pool.size()))
      << "wrote outside the states of its sequences";
  return result;
}

// Tokens [begin, end) of a sequence, starting from `state`.
Sequence Slice(const Case& c, const Sequence& sequence, int64_t begin, int64_t end, const std::vector<float>& state) {
  const int64_t width = c.heads * c.head_size;
  Sequence slice;
  slice.length = end - begin;
  for (int in = 0; in < kInputs; ++in) {
    slice.input[in].assign(sequence.input[in].begin() + begin * width, sequence.input[in].begin() + end * width);
  }
  slice.state = state;
  return slice;
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
  std::vector<float> state = sequence.state;
  for (int64_t t = 0; t < sequence.length; ++t) {
    const Sequence one = Slice(c, sequence, t, t + 1, state);
    const std::vector<float> next = Compute(reference::Wkv7, c, {one}, {0}).state[0];
    for (int64_t row = 0; row < c.heads * n; ++row) {
      double recall = 0.0;
      double read = 0.0;
      double reader = 0.0;
      for (int64_t j = 0; j < n; ++j) {
        const int64_t at = row / n * n + j;
        largest_state = std::max<double>(largest_state, std::abs(next[row * n + j]));
        recall += std::abs(static_cast<double>(state[row * n + j]) * one.input[4][at]);
        read += std::abs(static_cast<double>(next[row * n + j]) * one.input[0][at]);
        reader += std::abs(static_cast<double>(one.input[0][at]));
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
  const Result expected = Compute(reference::Wkv7, c, sequences, c.slots);
  const Result actual = Compute(table->wkv7, c, sequences, c.slots);
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Tolerances tolerances = ToleranceOf(c, sequences[i]);
    EXPECT_TRUE(AllClose(expected.y[i], actual.y[i], tolerances.y)) << "sequence " << i;
    EXPECT_TRUE(AllClose(expected.state[i], actual.state[i], tolerances.state)) << "sequence " << i;
  }
}

TEST_P(Wkv7Test, SequenceAloneHasTheBitsOfSequenceAmongOthers) {
  const auto& [table, c] = GetParam();
  const std::vector<Sequence> sequences = MakeSequences(c);
  const Result together = Compute(table->wkv7, c, sequences, c.slots);
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Result alone = Compute(table->wkv7, c, {sequences[i]}, {0});
    EXPECT_TRUE(SameBits(together.y[i], alone.y[0])) << "sequence " << i;
    EXPECT_TRUE(SameBits(together.state[i], alone.state[0])) << "sequence " << i;
  }
}

TEST_P(Wkv7Test, OrderOfTheSequencesIsFree) {
  const auto& [table, c] = GetParam();
  std::vector<Sequence> sequences = MakeSequences(c);
  const Result forward = Compute(table->wkv7, c, sequences, c.slots);
  std::reverse(sequences.begin(), sequences.end());
  const Result backward = Compute(table->wkv7, c, sequences, c.slots);
  for (size_t i = 0; i < sequences.size(); ++i) {
    EXPECT_TRUE(SameBits(forward.y[i], backward.y[sequences.size() - 1 - i])) << "sequence " << i;
    EXPECT_TRUE(SameBits(forward.state[i], backward.state[sequences.size() - 1 - i])) << "sequence " << i;
  }
}

TEST_P(Wkv7Test, SplitAtAnyTokenHasTheBitsOfTheWhole) {
  const auto& [table, c] = GetParam();
  for (const Sequence& sequence : MakeSequences(c)) {
    const Result whole = Compute(table->wkv7, c, {sequence}, {1});
    const int64_t step = sequence.length > 20 ? 37 : 1;
    for (int64_t split = 1; split < sequence.length; split += step) {
      const Result first = Compute(table->wkv7, c, {Slice(c, sequence, 0, split, sequence.state)}, {1});
      const Result second = Compute(table->wkv7, c, {Slice(c, sequence, split, sequence.length, first.state[0])}, {3});
      std::vector<float> joined = first.y[0];
      joined.insert(joined.end(), second.y[0].begin(), second.y[0].end());
      EXPECT_TRUE(SameBits(whole.y[0], joined)) << "split at " << split;
      EXPECT_TRUE(SameBits(whole.state[0], second.state[0])) << "split at " << split;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, Wkv7Test,
                         ::testing::Combine(::testing::ValuesIn(Backends()), ::testing::ValuesIn(Cases())),
                         [](const auto& info) {
                           return TestName(std::get<0>(info.param)) + "_" + std::get<1>(info.param).name;
                         });

}  // namespace
}  // namespace rwkv::kernels::conformance
