// DeepEmbedAttention of every backend against its formula in double, and its laws.
#include "kernels/api/deep_embed_attention.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/api/op_table.h"
#include "kernels/base/dtype.h"
#include "kernels/base/stream.h"
#include "kernels/conformance/conformance.h"
#include "kernels/conformance/recurrence.h"
#include "kernels/reference/reference.h"

namespace rwkv::kernels::conformance {
namespace {

constexpr int64_t kVocabulary = 7;

struct Case {
  std::string name;
  std::vector<int64_t> lengths = {3, 1, 5};
  std::vector<int64_t> cached = {4, 20, 0};  // tokens before these, of each sequence
  Packing packing = {{2, 0, 3}, 5, 0};
  int64_t capacity = 24;
  int64_t rank = 8;
  int64_t query_width = 20;
  int64_t width = 24;
  Storage storage = {"bf16", DType::kBFloat16};
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
  add("first_token", [](Case& c) { c.lengths = {1}, c.cached = {0}, c.packing.slots = {1}; });
  add("fills_the_cache", [](Case& c) { c.lengths = {4}, c.cached = {20}, c.packing.slots = {1}; });
  add("one_sequence", [](Case& c) { c.lengths = {19}, c.cached = {0}, c.packing.slots = {1}; });
  add("slots_reversed", [](Case& c) { c.packing.slots = {3, 2, 1}; });
  add("pool_with_gaps", [](Case& c) { c.packing.stride_gap = 13; });
  add("published_sizes", [](Case& c) { c.rank = 32, c.query_width = 256, c.width = 48; });
  for (int64_t size : {1, 3, 17}) {
    const std::string suffix = std::to_string(size);
    add("rank_" + suffix, [=](Case& c) { c.rank = size; });
    add("width_" + suffix, [=](Case& c) { c.width = size + 1; });
    add("query_width_" + suffix, [=](Case& c) { c.query_width = size + 1; });
  }
  for (const Storage& storage : Storages()) add(storage.name, [=](Case& c) { c.storage = storage; });
  return cases;
}

struct Problem {
  StoredMatrix k2, v2, k_emb, v_emb;
  Floats x_q, x_k, x_v, lnq_weight, lnq_bias, lnk_weight, lnk_bias, lnv_weight, lnv_bias;
  // Inputs: tokens, q, key, value; states: length, tokens, keys, values, q of the row before.
  std::vector<Sequence> sequences;
};

Floats Tokens(Random* random, int64_t count) {
  Floats tokens = random->Uniforms(count, 0.0f, static_cast<float>(kVocabulary));
  for (float& token : tokens) token = std::floor(token);
  return tokens;
}

Problem MakeProblem(const Case& c) {
  Random random(61);
  const auto matrix = [&](int64_t rows, int64_t cols, float range) {
    return StoredMatrix(c.storage, rows, cols, random.Uniforms(rows * cols, -range, range));
  };
  Problem p;
  p.k2 = matrix(c.query_width, c.rank, 1.0f);
  p.v2 = matrix(c.width, c.rank, 1.0f);
  p.k_emb = matrix(kVocabulary, c.query_width, 1.0f);
  p.v_emb = matrix(kVocabulary, c.width, 1.0f);
  for (Floats* mix : {&p.x_q, &p.x_k}) *mix = random.Uniforms(c.query_width, -0.2f, 1.2f);
  p.x_v = random.Uniforms(c.width, -0.2f, 1.2f);
  for (Floats* weight : {&p.lnq_weight, &p.lnk_weight}) *weight = random.Uniforms(c.query_width, 0.5f, 2.0f);
  for (Floats* bias : {&p.lnq_bias, &p.lnk_bias}) *bias = random.Uniforms(c.query_width, -0.5f, 0.5f);
  p.lnv_weight = random.Uniforms(c.width, 0.5f, 1.5f);
  p.lnv_bias = random.Uniforms(c.width, -0.5f, 0.5f);
  for (size_t i = 0; i < c.lengths.size(); ++i) {
    const auto padded = [&](Floats values, int64_t size) {
      values.resize(static_cast<size_t>(size), 99.0f);  // What is beyond the length must not matter.
      return values;
    };
    Sequence s;
    s.length = c.lengths[i];
    s.inputs = {Tokens(&random, s.length), random.Uniforms(s.length * c.query_width, -2.0f, 2.0f),
                random.Uniforms(s.length * c.rank, -1.0f, 1.0f), random.Uniforms(s.length * c.rank, -1.0f, 1.0f)};
    const int64_t cached = c.cached[i];
    s.states = {{static_cast<float>(cached)},
                padded(Tokens(&random, cached), c.capacity),
                padded(random.Uniforms(cached * c.rank, -1.0f, 1.0f), c.capacity * c.rank),
                padded(random.Uniforms(cached * c.rank, -1.0f, 1.0f), c.capacity * c.rank),
                cached > 0 ? random.Uniforms(c.query_width, -2.0f, 2.0f) : Floats(static_cast<size_t>(c.query_width))};
    p.sequences.push_back(s);
  }
  return p;
}

// `start`: what y holds before.
Recurrence MakeRecurrence(const Case& c, const Problem& p, float start = 0.0f) {
  const auto run = [&c, &p, start](const OpTable& table, const PackedCall& call, Stream& stream) {
    const std::vector<int32_t> tokens(call.inputs[0].begin(), call.inputs[0].end());
    std::fill(call.y, call.y + call.rows * c.width, start);
    DeepEmbedAttentionArgs args;
    args.rows = call.rows;
    args.spans = call.spans.data();
    args.span_count = static_cast<int64_t>(call.spans.size());
    args.state_slots = call.slots;
    args.capacity = c.capacity;
    args.length = call.states[0];
    args.token_cache = call.states[1];
    args.key_cache = call.states[2];
    args.value_cache = call.states[3];
    args.q_previous = call.states[4];
    args.k2 = p.k2.view();
    args.v2 = p.v2.view();
    args.k_emb = p.k_emb.view();
    args.v_emb = p.v_emb.view();
    args.x_q = p.x_q.data();
    args.x_k = p.x_k.data();
    args.x_v = p.x_v.data();
    args.lnq_weight = p.lnq_weight.data();
    args.lnq_bias = p.lnq_bias.data();
    args.lnk_weight = p.lnk_weight.data();
    args.lnk_bias = p.lnk_bias.data();
    args.lnv_weight = p.lnv_weight.data();
    args.lnv_bias = p.lnv_bias.data();
    args.tokens = tokens.data();
    args.q = call.inputs[1].data();
    args.key = call.inputs[2].data();
    args.value = call.inputs[3].data();
    args.y = call.y;
    return table.deep_embed_attention(args, stream);
  };
  return {c.width, run};
}

using Doubles = std::vector<double>;

// A normalised vector, and what each element is off by if each that went in was off by `error`.
struct Normed {
  Doubles z;
  Doubles error;
};

Normed LayerNorm(const Doubles& x, double error, const Floats& weight, const Floats& bias) {
  const auto n = static_cast<double>(x.size());
  double mean = 0.0;
  double magnitude = 0.0;
  for (double value : x) mean += value / n;
  for (double value : x) magnitude += std::abs(value) / n;
  double variance = 0.0;
  for (double value : x) variance += (value - mean) * (value - mean) / n;
  const double scale = 1.0 / std::sqrt(variance + 1e-5);
  // A sum of n loses n roundings of its magnitude; the scale is a root of one.
  const double sum_roundings = (n + 4) * kUnitRoundoff;
  Normed normed;
  for (size_t c = 0; c < x.size(); ++c) {
    const double z = (x[c] - mean) * scale;
    normed.z.push_back(z * weight[c] + bias[c]);
    const double of_mean = 2 * scale * error + scale * magnitude * sum_roundings;
    const double of_scale = std::abs(z) * (scale * error + sum_roundings / 2);
    normed.error.push_back(weight[c] * (of_mean + of_scale) +
                           6 * kUnitRoundoff * (std::abs(normed.z.back()) + std::abs(bias[c])));
  }
  return normed;
}

struct Expected {
  Floats y;
  Doubles tolerance;
};

// The formula of the header for one sequence, every key and value made anew for each row.
Expected ByFormula(const Case& c, const Problem& p, const Sequence& s) {
  const auto cached = static_cast<int64_t>(s.states[0][0]);
  const auto history = [&](int input, int state, int64_t width, int64_t t) {
    const Floats& from = t < cached ? s.states[state] : s.inputs[input];
    const int64_t row = t < cached ? t : t - cached;
    return Doubles(from.begin() + row * width, from.begin() + (row + 1) * width);
  };
  const auto rebuilt = [&](int input, int state, const StoredMatrix& expand, const StoredMatrix& table, bool tanh,
                           const Floats& mix, const Floats& weight, const Floats& bias, int64_t t) {
    Doubles mixed(static_cast<size_t>(expand.rows));
    double error = 0.0;
    for (int64_t out = 0; out < expand.rows; ++out) {
      double row[2] = {0.0, 0.0};  // token t - 1 and t
      double row_error[2] = {0.0, 0.0};
      for (int back = 0; back < 2 && t - back >= 0; ++back) {
        const Doubles x = history(input, state, expand.cols, t - back);
        const auto token = static_cast<int64_t>(history(0, 1, 1, t - back)[0]);
        double sum = 0.0;
        double magnitude = 0.0;
        for (int64_t i = 0; i < expand.cols; ++i) {
          sum += x[i] * expand.widened[out * expand.cols + i];
          magnitude += std::abs(x[i] * expand.widened[out * expand.cols + i]);
        }
        const double factor = table.widened[token * table.cols + out];
        row[1 - back] = (tanh ? std::tanh(sum) : sum) * factor;
        row_error[1 - back] = std::abs(factor) * (static_cast<double>(expand.cols + 10) * kUnitRoundoff * magnitude +
                                                  (tanh ? 2 * kFunctionUlps * kUnitRoundoff : 0.0));
      }
      mixed[out] = row[1] + (row[0] - row[1]) * mix[out];
      error = std::max(error,
                       2.2 * (row_error[0] + row_error[1]) + 6 * kUnitRoundoff * (std::abs(row[0]) + std::abs(row[1])));
    }
    return LayerNorm(mixed, error, weight, bias);
  };

  Expected expected;
  for (int64_t row = 0; row < s.length; ++row) {
    Doubles mixed(static_cast<size_t>(c.query_width));
    for (int64_t i = 0; i < c.query_width; ++i) {
      const double now = s.inputs[1][row * c.query_width + i];
      const double before = row > 0 ? s.inputs[1][(row - 1) * c.query_width + i] : s.states[4][i];
      mixed[i] = now + (before - now) * p.x_q[i];
    }
    const Normed q = LayerNorm(mixed, 8 * 2.0 * kUnitRoundoff, p.lnq_weight, p.lnq_bias);
    Doubles weighted(static_cast<size_t>(c.width));
    double total = 0.0;
    double weight_error = 0.0;  // relative
    double value_error = 0.0;
    double largest_value = 0.0;
    for (int64_t t = 0; t <= cached + row; ++t) {
      const Normed key = rebuilt(2, 2, p.k2, p.k_emb, false, p.x_k, p.lnk_weight, p.lnk_bias, t);
      const Normed value = rebuilt(3, 3, p.v2, p.v_emb, true, p.x_v, p.lnv_weight, p.lnv_bias, t);
      double product = 0.0;
      double product_error = 0.0;
      const double sum_roundings = static_cast<double>(c.query_width + 10) * kUnitRoundoff;
      for (int64_t i = 0; i < c.query_width; ++i) {
        product += q.z[i] * key.z[i];
        product_error += std::abs(q.z[i]) * key.error[i] + std::abs(key.z[i]) * q.error[i] +
                         sum_roundings * std::abs(q.z[i] * key.z[i]);
      }
      const double score = 64.0 * std::tanh(product / 1024.0);
      // tanh and its product by 64 are relative to the score; exp adds its own.
      weight_error =
          std::max(weight_error, product_error / 16 + (2 * kFunctionUlps + 4) * kUnitRoundoff * (std::abs(score) + 1));
      for (int64_t i = 0; i < c.width; ++i) {
        value_error = std::max(value_error, value.error[i]);
        largest_value = std::max(largest_value, std::abs(value.z[i]));
      }
      const double weight = std::exp(score);
      total += weight;
      for (int64_t i = 0; i < c.width; ++i) weighted[i] += weight * value.z[i];
    }
    const auto count = static_cast<double>(cached + row + 1);
    for (double sum : weighted) {
      expected.y.push_back(static_cast<float>(sum / total));
      expected.tolerance.push_back(largest_value * (2 * weight_error + 2 * (count + 10) * kUnitRoundoff) + value_error);
    }
  }
  return expected;
}

class DeepEmbedAttentionTest : public ::testing::TestWithParam<std::tuple<const OpTable*, Case>> {};

TEST_P(DeepEmbedAttentionTest, EqualsTheFormula) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  const std::vector<SequenceResult> actual = Compute(*table, MakeRecurrence(c, p), p.sequences, c.packing);
  for (size_t s = 0; s < actual.size(); ++s) {
    const Expected expected = ByFormula(c, p, p.sequences[s]);
    EXPECT_TRUE(AllClose(expected.y, actual[s].y, expected.tolerance)) << "sequence " << s;
    // A formula that is not this one is off by about one.
    EXPECT_LT(*std::max_element(expected.tolerance.begin(), expected.tolerance.end()), 0.1) << "sequence " << s;
  }
}

// States are copies of inputs.
TEST_P(DeepEmbedAttentionTest, StatesHaveTheBitsOfTheReference) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  const Recurrence recurrence = MakeRecurrence(c, p);
  const std::vector<SequenceResult> expected = Compute(reference::Table(), recurrence, p.sequences, c.packing);
  const std::vector<SequenceResult> actual = Compute(*table, recurrence, p.sequences, c.packing);
  for (size_t s = 0; s < actual.size(); ++s) {
    EXPECT_EQ(actual[s].states[0][0], p.sequences[s].states[0][0] + static_cast<float>(p.sequences[s].length));
    for (size_t i = 0; i < expected[s].states.size(); ++i) {
      EXPECT_TRUE(SameBits(expected[s].states[i], actual[s].states[i])) << "sequence " << s << ", state " << i;
    }
  }
}

TEST_P(DeepEmbedAttentionTest, AddsToItsOutput) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  const std::vector<SequenceResult> alone = Compute(*table, MakeRecurrence(c, p), p.sequences, c.packing);
  const std::vector<SequenceResult> added = Compute(*table, MakeRecurrence(c, p, 3.0f), p.sequences, c.packing);
  for (size_t s = 0; s < alone.size(); ++s) {
    Floats expected = alone[s].y;
    for (float& value : expected) value += 3.0f;
    EXPECT_TRUE(SameBits(expected, added[s].y)) << "sequence " << s;
  }
}

TEST_P(DeepEmbedAttentionTest, SequenceAloneHasTheBitsOfSequenceAmongOthers) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  ExpectSequencesAreIndependent(*table, MakeRecurrence(c, p), p.sequences, c.packing);
}

TEST_P(DeepEmbedAttentionTest, OrderOfTheSequencesIsFree) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  ExpectOrderIsFree(*table, MakeRecurrence(c, p), p.sequences, c.packing);
}

TEST_P(DeepEmbedAttentionTest, SplitAtAnyTokenHasTheBitsOfTheWhole) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  ExpectAnySplitIsTheWhole(*table, MakeRecurrence(c, p), p.sequences);
}

TEST_P(DeepEmbedAttentionTest, TablesOfOneFamilyGiveTheSameBits) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  ExpectFamilyAgrees(*table, MakeRecurrence(c, p), p.sequences, c.packing);
}

INSTANTIATE_TEST_SUITE_P(Backends, DeepEmbedAttentionTest,
                         ::testing::Combine(::testing::ValuesIn(Backends()), ::testing::ValuesIn(Cases())),
                         [](const auto& info) {
                           return TestName(std::get<0>(info.param)) + "_" + std::get<1>(info.param).name;
                         });

}  // namespace
}  // namespace rwkv::kernels::conformance
