// DeepEmbedAttention of every backend.
#include "kernels/api/deep_embed_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/api/op_table.h"
#include "kernels/api/sequence_span.h"
#include "kernels/base/status_macros.h"
#include "kernels/conformance/bounded.h"
#include "kernels/conformance/conformance.h"
#include "kernels/conformance/device_memory.h"
#include "kernels/conformance/op_suite.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::conformance {
namespace {

constexpr int64_t kVocabulary = 7;

struct Case {
  std::string name;
  std::vector<int64_t> lengths = {3, 1, 5};
  std::vector<int64_t> cached = {4, 20, 0};  // tokens before these, of each sequence
  Packing packing;
  int64_t capacity = 24;
  int64_t rank = 8;
  int64_t query_width = 20;
  int64_t width = 24;
  Storage storage = {"bf16", DType::kBFloat16};
};

struct Weights {
  StoredMatrix k2, v2;
  Floats k_emb, v_emb, x_q, x_k, x_v, lnq_weight, lnq_bias, lnk_weight, lnk_bias, lnv_weight, lnv_bias;
};

enum Input { kQuery, kKey, kValue, kStart };
enum State { kLength, kTokens, kKeys, kValues, kLastQuery };

// One of keys and values: how it is rebuilt from a cache.
struct Rebuilt {
  const StoredMatrix& expand;
  const Floats& table;
  const Floats& mix;
  const Floats& weight;
  const Floats& bias;
  bool tanh;
};

// The normalised key or value of token t >= 0 of a cache that holds it and the one before.
Bounds Rebuild(const Rebuilt& r, const Floats& cache, const Floats& tokens, int64_t t) {
  const int64_t rank = r.expand.cols;
  const Bounds inputs[2] = {ProductInputs(r.expand.view(), cache.data() + t * rank),
                            t > 0 ? ProductInputs(r.expand.view(), cache.data() + (t - 1) * rank) : Bounds()};
  Bounds mixed;
  for (int64_t out = 0; out < r.expand.rows; ++out) {
    Bounded row[2];  // token t - 1 and t
    for (int back = 0; back < 2 && t - back >= 0; ++back) {
      const Bounded z = Dot(inputs[back].data(), r.expand.widened.data() + out * rank, rank);
      const auto token = static_cast<int64_t>(tokens[t - back]);
      row[1 - back] = (r.tanh ? Tanh(z) : z) * Bounded(r.table[token * r.expand.rows + out]);
    }
    mixed.push_back(row[1] + (row[0] - row[1]) * Bounded(r.mix[out]));
  }
  return Normalize(mixed, r.weight.data(), r.bias.data(), 1e-5f);
}

RowResult Formula(const Case& c, const Weights& p, const Sequence& row) {
  std::vector<Floats> states = row.states;
  const auto position = static_cast<int64_t>(states[kLength][0]);
  states[kLength][0] += 1.0f;
  states[kTokens][position] = static_cast<float>(row.tokens[0]);
  std::copy(row.inputs[kKey].begin(), row.inputs[kKey].end(), states[kKeys].begin() + position * c.rank);
  std::copy(row.inputs[kValue].begin(), row.inputs[kValue].end(), states[kValues].begin() + position * c.rank);

  Bounds query;
  for (int64_t i = 0; i < c.query_width; ++i) {
    const Bounded now = row.inputs[kQuery][i];
    query.push_back(now + (Bounded(states[kLastQuery][i]) - now) * Bounded(p.x_q[i]));
  }
  query = Normalize(query, p.lnq_weight.data(), p.lnq_bias.data(), 1e-5f);
  states[kLastQuery] = row.inputs[kQuery];

  const Rebuilt key = {p.k2, p.k_emb, p.x_k, p.lnk_weight, p.lnk_bias, false};
  const Rebuilt value = {p.v2, p.v_emb, p.x_v, p.lnv_weight, p.lnv_bias, true};
  Bounds weights;
  std::vector<Bounds> weighted(c.width);
  for (int64_t t = 0; t <= position; ++t) {
    const Bounds k = Rebuild(key, states[kKeys], states[kTokens], t);
    const Bounds v = Rebuild(value, states[kValues], states[kTokens], t);
    const Bounded score = Bounded(64.0) * Tanh(Dot(query.data(), k.data(), c.query_width) * Bounded(1.0 / 1024));
    weights.push_back(Exp(score));
    for (int64_t i = 0; i < c.width; ++i) weighted[i].push_back(weights.back() * v[i]);
  }
  RowResult result;
  for (int64_t i = 0; i < c.width; ++i) {
    result.y.push_back(Bounded(row.inputs[kStart][i]) + Sum(weighted[i]) / Sum(weights));
  }
  for (const Floats& state : states) result.states.emplace_back(state.begin(), state.end());
  return result;
}

Floats Tokens(Random* random, int64_t count) {
  Floats tokens = random->Uniforms(count, 0.0f, static_cast<float>(kVocabulary));
  for (float& token : tokens) token = std::floor(token);
  return tokens;
}

OpCase Make(const Case& c) {
  Random random(61);
  Weights p;
  p.k2 = StoredMatrix(c.storage, c.query_width, c.rank, random.Uniforms(c.query_width * c.rank, -1.0f, 1.0f));
  p.v2 = StoredMatrix(c.storage, c.width, c.rank, random.Uniforms(c.width * c.rank, -1.0f, 1.0f));
  // With a row of numbers behind the vocabulary's, which an id beyond it must not find.
  p.k_emb = random.Uniforms((kVocabulary + 1) * c.query_width, -1.0f, 1.0f);
  p.v_emb = random.Uniforms((kVocabulary + 1) * c.width, -1.0f, 1.0f);
  for (Floats* mix : {&p.x_q, &p.x_k}) *mix = random.Uniforms(c.query_width, -0.2f, 1.2f);
  p.x_v = random.Uniforms(c.width, -0.2f, 1.2f);
  for (Floats* weight : {&p.lnq_weight, &p.lnk_weight}) *weight = random.Uniforms(c.query_width, 0.5f, 2.0f);
  for (Floats* bias : {&p.lnq_bias, &p.lnk_bias}) *bias = random.Uniforms(c.query_width, -0.5f, 0.5f);
  p.lnv_weight = random.Uniforms(c.width, 0.5f, 1.5f);
  p.lnv_bias = random.Uniforms(c.width, -0.5f, 0.5f);
  OpCase op;
  op.y_width = c.width;
  op.packing = c.packing;
  for (size_t i = 0; i < c.lengths.size(); ++i) {
    const auto padded = [&](Floats values, int64_t size) {
      values.resize(static_cast<size_t>(size), 99.0f);  // What is beyond the length must not matter.
      return values;
    };
    const int64_t cached = c.cached[i];
    Sequence s;
    s.length = c.lengths[i];
    s.inputs = {random.Uniforms(s.length * c.query_width, -2.0f, 2.0f), random.Uniforms(s.length * c.rank, -1.0f, 1.0f),
                random.Uniforms(s.length * c.rank, -1.0f, 1.0f), random.Uniforms(s.length * c.width, -3.0f, 3.0f)};
    const Floats tokens = Tokens(&random, s.length);
    s.tokens.assign(tokens.begin(), tokens.end());
    s.states = {{static_cast<float>(cached)},
                padded(Tokens(&random, cached), c.capacity),
                padded(random.Uniforms(cached * c.rank, -1.0f, 1.0f), c.capacity * c.rank),
                padded(random.Uniforms(cached * c.rank, -1.0f, 1.0f), c.capacity * c.rank),
                cached > 0 ? random.Uniforms(c.query_width, -2.0f, 2.0f) : Floats(static_cast<size_t>(c.query_width))};
    op.sequences.push_back(s);
  }
  op.run = [=](DeviceMemory& memory, const OpCall& call) {
    DeepEmbedAttentionArgs args;
    args.step = &call.step;
    args.vocabulary = kVocabulary;
    args.capacity = c.capacity;
    args.length = call.states[kLength];
    args.token_cache = call.states[kTokens];
    args.key_cache = call.states[kKeys];
    args.value_cache = call.states[kValues];
    args.q_previous = call.states[kLastQuery];
    args.k2 = memory.Load(p.k2.view());
    args.v2 = memory.Load(p.v2.view());
    args.k_emb = memory.Put(p.k_emb);
    args.v_emb = memory.Put(p.v_emb);
    args.x_q = memory.Put(p.x_q);
    args.x_k = memory.Put(p.x_k);
    args.x_v = memory.Put(p.x_v);
    args.lnq_weight = memory.Put(p.lnq_weight);
    args.lnq_bias = memory.Put(p.lnq_bias);
    args.lnk_weight = memory.Put(p.lnk_weight);
    args.lnk_bias = memory.Put(p.lnk_bias);
    args.lnv_weight = memory.Put(p.lnv_weight);
    args.lnv_bias = memory.Put(p.lnv_bias);
    args.q = call.inputs[kQuery];
    args.key = call.inputs[kKey];
    args.value = call.inputs[kValue];
    args.y = call.y;
    // What is added to; rows of nobody are zeros, and stay so.
    RWKV_RETURN_IF_ERROR(memory.stream().Zero(call.y, call.step.rows * c.width * 4));
    for (int64_t row = 0; row < call.step.rows; ++row) {
      if (call.is_padding[row]) continue;
      RWKV_RETURN_IF_ERROR(
          memory.stream().Copy(call.y + row * c.width, call.inputs[kStart] + row * c.width, c.width * 4));
    }
    return memory.device().ops().deep_embed_attention(args, memory.stream());
  };
  op.formula = [=](const Sequence& row) { return Formula(c, p, row); };
  return op;
}

std::vector<std::shared_ptr<const OpCase>> Cases() {
  Table<Case> table;
  table.Add("base", [](Case&) {});
  table.Add("first_token", [](Case& c) { c.lengths = {1}, c.cached = {0}, c.packing.slots = {1}; });
  table.Add("fills_the_cache", [](Case& c) { c.lengths = {4}, c.cached = {20}, c.packing.slots = {1}; });
  table.Add("one_sequence", [](Case& c) { c.lengths = {19}, c.cached = {0}, c.packing.slots = {1}; });
  table.Add("slots_reversed", [](Case& c) { c.packing.slots = {3, 2, 1}; });
  table.Add("pool_with_gaps", [](Case& c) { c.packing.stride_gap = 13; });
  table.Add("published_sizes", [](Case& c) { c.rank = 32, c.query_width = 256, c.width = 48; });
  for (int64_t size : {1, 3, 17}) {
    const std::string suffix = std::to_string(size);
    table.Add("rank_" + suffix, [=](Case& c) { c.rank = size; });
    table.Add("width_" + suffix, [=](Case& c) { c.width = size + 1; });
    table.Add("query_width_" + suffix, [=](Case& c) { c.query_width = size + 1; });
  }
  for (const Storage& storage : Storages()) {
    table.Add(storage.name, [=](Case& c) { c.storage = storage; });
    // Several groups, the last one short.
    table.Add(storage.name + "_rank_85", [=](Case& c) { c.storage = storage, c.rank = 85; });
  }
  return table.Build(Make);
}

RWKV_TEST_OPERATION(DeepEmbedAttention, Cases());

// A call of all sequences of a case, in slots without gaps, and what its states are before it.
struct PutCall {
  PutCall(DeviceMemory& memory, const Case& c, const OpCase& op) {
    const std::vector<SequenceSpan> spans = PackSpans(c.lengths, c.packing.slots);
    std::vector<int32_t> tokens;
    std::vector<Floats> inputs(op.sequences[0].inputs.size());
    for (const Sequence& sequence : op.sequences) {
      tokens.insert(tokens.end(), sequence.tokens.begin(), sequence.tokens.end());
      for (size_t i = 0; i < inputs.size(); ++i) {
        inputs[i].insert(inputs[i].end(), sequence.inputs[i].begin(), sequence.inputs[i].end());
      }
    }
    const auto rows = static_cast<int64_t>(tokens.size());
    call.is_padding.assign(tokens.size(), false);
    call.step = {rows, static_cast<int64_t>(spans.size()), memory.Put(absl::MakeConstSpan(spans)),
                 memory.Put(absl::MakeConstSpan(tokens))};
    for (const Floats& input : inputs) call.inputs.push_back(memory.Put(input));
    for (size_t i = 0; i < op.sequences[0].states.size(); ++i) {
      const auto stride = static_cast<int64_t>(op.sequences[0].states[i].size());
      pools.emplace_back(static_cast<size_t>(3 * stride));
      for (size_t s = 0; s < op.sequences.size(); ++s) {
        std::copy_n(op.sequences[s].states[i].begin(), stride, pools[i].begin() + c.packing.slots[s] * stride);
      }
      call.states.push_back({memory.Put(pools[i]), stride});
    }
    call.y = memory.Unwritten(rows * c.width);
  }
  OpCall call;
  std::vector<Floats> pools;
};

// A length or an id that is none, or more tokens than there is room for. Where the host cannot read states, rows of NaN
// say so, and beside them another sequence goes on.
TEST(DeepEmbedAttentionTest, AStateThatIsNoCacheIsRefusedOrGivesNoNumber) {
  struct Row {
    const char* name;
    State state;
    int64_t at;
    float value;
    bool changes;  // Where it is not refused.
  };
  Case c;
  c.lengths = {3, 2};
  c.cached = {4, 7};
  c.packing.slots = {2, 0};
  for (const Row& bad : {Row{"too long", kLength, 0, 22.0f, false}, Row{"negative", kLength, 0, -1.0f, false},
                         Row{"no whole number", kLength, 0, 3.5f, false}, Row{"NaN", kLength, 0, NAN, false},
                         Row{"beyond the capacity", kLength, 0, 3e9f, false}, Row{"no token", kTokens, 3, 7.0f, true},
                         Row{"a negative id", kTokens, 0, -1.0f, true}, Row{"half an id", kTokens, 2, 1.5f, true}}) {
    const OpCase good = Make(c);
    OpCase op = good;
    op.sequences[0].states[bad.state][bad.at] = bad.value;
    for (const std::string& backend : Backends()) {
      SCOPED_TRACE(std::string(bad.name) + " on " + backend);
      DeviceMemory memory(OpenedDevice(backend));
      const PutCall put(memory, c, op);
      const absl::Status status = op.run(memory, put.call);
      const bool refuses = !absl::StartsWith(backend, "cuda");
      EXPECT_EQ(status.ok(), !refuses) << status;
      for (size_t i = 0; i < put.pools.size(); ++i) {
        const int64_t slot = 2 * put.call.states[i].stride;
        const Floats after = memory.Get(put.call.states[i].data, static_cast<int64_t>(put.pools[i].size()));
        if (refuses) {
          EXPECT_TRUE(SameBits(put.pools[i], after)) << "state " << i;
        } else if (!bad.changes) {
          EXPECT_TRUE(
              SameBits(absl::MakeConstSpan(put.pools[i]).subspan(slot), absl::MakeConstSpan(after).subspan(slot)))
              << "state " << i;
        }
      }
      if (refuses) continue;
      const Floats y = memory.Get(put.call.y, 5 * c.width);
      for (int64_t i = 0; i < 3 * c.width; ++i) ASSERT_TRUE(std::isnan(y[i])) << i;
      EXPECT_TRUE(SameBits(Compute(backend, good, {good.sequences[1]}, {{0}, 1, 0})[0].y,
                           absl::MakeConstSpan(y).subspan(3 * c.width)));
    }
  }
}

// Inputs below half a step of their group's fixed point are zeros to weights of few bits, and to no others.
TEST(DeepEmbedAttentionTest, WeightsOfFewBitsMeetInputsInFixedPoint) {
  for (const Storage& storage : Storages()) {
    Case c;
    c.storage = storage;
    const OpCase op = Make(c);
    const auto sequence = [&](float small) {
      Sequence s = op.sequences[0];
      for (Floats* rows : {&s.inputs[kKey], &s.inputs[kValue], &s.states[kKeys], &s.states[kValues]}) {
        for (size_t i = 0; i < rows->size(); ++i) (*rows)[i] = static_cast<int64_t>(i) % c.rank == 0 ? 1.0f : small;
      }
      return s;
    };
    for (const std::string& backend : Backends()) {
      const Floats zeros = Compute(backend, op, {sequence(0.0f)}, {{0}, 1, 0})[0].y;
      const Floats small = Compute(backend, op, {sequence(1e-5f)}, {{0}, 1, 0})[0].y;
      EXPECT_EQ(SameBits(zeros, small), storage.quantization != Quantization::kNone) << storage.name << " " << backend;
    }
  }
}

TEST(DeepEmbedAttentionTest, AsManyChannelsAsTheDeviceSays) {
  Case c;
  c.lengths = {2};
  c.cached = {1};
  c.packing.slots = {1};
  c.rank = 2;
  for (const std::string& backend : Backends()) {
    DeviceMemory memory(OpenedDevice(backend));
    const int64_t most = memory.device().ops().max_attention_channels;
    if (most == std::numeric_limits<int64_t>::max()) continue;
    c.width = most - c.query_width;
    const OpCase largest = Make(c);
    EXPECT_OK(largest.run(memory, PutCall(memory, c, largest).call)) << backend;
    EXPECT_OK(memory.stream().Synchronize());
    ++c.width;
    const OpCase op = Make(c);
    EXPECT_THAT(op.run(memory, PutCall(memory, c, op).call),
                rwkv::testing::StatusIs(absl::StatusCode::kUnimplemented, ::testing::HasSubstr("more than")))
        << backend;
  }
}

}  // namespace
}  // namespace rwkv::kernels::conformance
