// A whole RWKV-7 block made of the operations, as a worker makes it, against reference::Rwkv7Block; and the laws of the
// whole.
#include "kernels/reference/block.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "kernels/api/mix_input.h"
#include "kernels/api/op_table.h"
#include "kernels/api/products.h"
#include "kernels/api/sequence_span.h"
#include "kernels/api/step_rows.h"
#include "kernels/api/wkv7.h"
#include "kernels/base/dtype.h"
#include "kernels/base/weight.h"
#include "kernels/conformance/conformance.h"
#include "kernels/conformance/device_memory.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::conformance {
namespace {

using reference::Rwkv7BlockState;
using reference::Rwkv7BlockWeights;
using Floats = std::vector<float>;

constexpr int64_t kWidth = 40;
constexpr int64_t kHeads = 3;
constexpr int64_t kHeadSize = 9;
constexpr int64_t kChannels = kHeads * kHeadSize;  // not the width, to tell one from the other
constexpr int64_t kFfnWidth = 70;
constexpr int64_t kSlots = 4;

Rwkv7BlockWeights MakeWeights(uint32_t seed) {
  Random random(seed);
  const auto vector = [&](int64_t size, float low, float high) { return random.Uniforms(size, low, high); };
  const auto matrix = [&](int64_t a, int64_t b, int64_t inputs) {
    const float range = 2.0f / std::sqrt(static_cast<float>(inputs));
    return random.Uniforms(a * b, -range, range);
  };
  Rwkv7BlockWeights w;
  w.width = kWidth;
  w.heads = kHeads;
  w.head_size = kHeadSize;
  w.ffn_width = kFfnWidth;
  for (Floats* weight : {&w.ln1_weight, &w.ln2_weight}) *weight = vector(kWidth, 0.3f, 1.4f);
  for (Floats* bias : {&w.ln1_bias, &w.ln2_bias}) *bias = vector(kWidth, -0.2f, 0.2f);
  for (Floats* mix : {&w.x_r, &w.x_w, &w.x_k, &w.x_v, &w.x_a, &w.x_g, &w.ffn_x_k}) *mix = vector(kWidth, -0.2f, 1.2f);
  w.w0 = vector(kChannels, -6.0f, 0.5f);
  for (Floats* bias : {&w.a0, &w.v0, &w.r_k, &w.ln_x_bias}) *bias = vector(kChannels, -0.7f, 0.7f);
  for (Floats* scale : {&w.k_k, &w.k_a, &w.ln_x_weight}) *scale = vector(kChannels, 0.5f, 1.2f);
  struct LowRank {
    Floats* first;
    Floats* second;
    int64_t rank;
  };
  for (const LowRank& pair :
       {LowRank{&w.w1, &w.w2, 7}, LowRank{&w.a1, &w.a2, 5}, LowRank{&w.v1, &w.v2, 3}, LowRank{&w.g1, &w.g2, 17}}) {
    *pair.first = matrix(kWidth, pair.rank, kWidth);
    *pair.second = matrix(pair.rank, kChannels, pair.rank);
  }
  for (Floats* projection : {&w.receptance, &w.key, &w.value}) *projection = matrix(kChannels, kWidth, kWidth);
  w.output = matrix(kWidth, kChannels, kChannels);
  w.ffn_key = matrix(kFfnWidth, kWidth, kWidth);
  w.ffn_value = matrix(kWidth, kFfnWidth, kFfnWidth);
  return w;
}

// [in, out] to [out, in], as a loader does it for the low-rank factors.
Floats Transpose(const Floats& matrix, int64_t inputs) {
  const int64_t outputs = static_cast<int64_t>(matrix.size()) / inputs;
  Floats transposed(matrix.size());
  for (int64_t i = 0; i < inputs; ++i) {
    for (int64_t o = 0; o < outputs; ++o) transposed[o * inputs + i] = matrix[i * outputs + o];
  }
  return transposed;
}

// States of all slots, in device memory: one pool a tensor.
struct Pools {
  explicit Pools(DeviceMemory& memory)
      : att_x_prev(memory.Zeros(kSlots * kWidth)),
        att_state(memory.Zeros(kSlots * kChannels * kHeadSize)),
        ffn_x_prev(memory.Zeros(kSlots * kWidth)) {}
  float* att_x_prev;
  float* att_state;
  float* ffn_x_prev;
};

// The block by operations, as a worker composes it, for the rows of a step; x in and out, v_first out of the first
// layer and into the others.
void RunBlock(DeviceMemory& memory, const Rwkv7BlockWeights& w, bool first_layer, const StepRows& step,
              const Pools& pools, float* x, float* v_first) {
  const OpTable& ops = memory.device().ops();
  std::deque<Floats> transposed;  // What the device has loaded stays where it is.
  const auto load = [&](const Floats& weight, int64_t outputs) {
    return memory.Load({DType::kFloat32, outputs, static_cast<int64_t>(weight.size()) / outputs, weight.data()});
  };
  // [in, out] factors as [out, in].
  const auto load_low_rank = [&](const Floats& factor, int64_t inputs) {
    transposed.push_back(Transpose(factor, inputs));
    return load(transposed.back(), static_cast<int64_t>(factor.size()) / inputs);
  };
  const auto product = [&](const Weight* weight, const float* in, Activation activation = Activation::kNone) {
    Product p;
    p.weight = weight;
    p.x = in;
    p.activation = activation;
    p.y = memory.Zeros(step.rows * weight->matrix.rows);
    return p;
  };
  const auto run = [&](const std::vector<Product>& products) {
    EXPECT_OK(ops.products({step.rows, products.data(), static_cast<int64_t>(products.size())}, memory.stream()));
  };
  const auto mix = [&](const Floats& weight, const Floats& bias, float* pool, const std::vector<const Floats*>& mixes) {
    MixInputArgs args;
    args.step = &step;
    args.width = kWidth;
    args.x = x;
    args.weight = memory.Put(weight);
    args.bias = memory.Put(bias);
    args.shift = {pool, kWidth};
    args.outputs = static_cast<int64_t>(mixes.size());
    for (size_t m = 0; m < mixes.size(); ++m) {
      args.mix[m] = memory.Put(*mixes[m]);
      args.y[m] = memory.Zeros(step.rows * kWidth);
    }
    EXPECT_OK(ops.mix_input(args, memory.stream()));
    return std::vector<const float*>(args.y, args.y + mixes.size());
  };

  const std::vector<const float*> in =
      mix(w.ln1_weight, w.ln1_bias, pools.att_x_prev, {&w.x_r, &w.x_w, &w.x_k, &w.x_v, &w.x_a, &w.x_g});
  std::vector<Product> first = {
      product(load(w.receptance, kChannels), in[0]), product(load(w.key, kChannels), in[2]),
      product(load(w.value, kChannels), in[3]),      product(load_low_rank(w.w1, kWidth), in[1], Activation::kTanh),
      product(load_low_rank(w.a1, kWidth), in[4]),   product(load_low_rank(w.g1, kWidth), in[5], Activation::kSigmoid),
      product(load_low_rank(w.v1, kWidth), in[3])};
  if (first_layer) first[2].y = v_first;
  run(first);
  const auto up = [&](const Floats& factor, const Product& down) {
    return product(load_low_rank(factor, down.weight->matrix.rows), down.y);
  };
  const std::vector<Product> second = {up(w.w2, first[3]), up(w.a2, first[4]), up(w.g2, first[5]), up(w.v2, first[6])};
  run(second);

  Wkv7Args wkv;
  wkv.step = &step;
  wkv.heads = kHeads;
  wkv.head_size = kHeadSize;
  wkv.state = {pools.att_state, kChannels * kHeadSize};
  wkv.decay_bias = memory.Put(w.w0);
  wkv.iclr_bias = memory.Put(w.a0);
  wkv.k_k = memory.Put(w.k_k);
  wkv.k_a = memory.Put(w.k_a);
  wkv.bonus = memory.Put(w.r_k);
  wkv.ln_weight = memory.Put(w.ln_x_weight);
  wkv.ln_bias = memory.Put(w.ln_x_bias);
  wkv.r = first[0].y;
  wkv.k = first[1].y;
  wkv.v = first[2].y;
  wkv.g = second[2].y;
  wkv.decay_lora = second[0].y;
  wkv.iclr_lora = second[1].y;
  if (!first_layer) {
    wkv.value_gate_bias = memory.Put(w.v0);
    wkv.value_gate_lora = second[3].y;
    wkv.v_first = v_first;
  }
  wkv.y = memory.Zeros(step.rows * kChannels);
  EXPECT_OK(ops.wkv7(wkv, memory.stream()));
  const auto add = [&](const Floats& weight, const float* from) {
    Product p;
    p.weight = load(weight, kWidth);
    p.x = from;
    p.accumulate = true;
    p.y = x;
    run({p});
  };
  add(w.output, wkv.y);

  const std::vector<const float*> mixed = mix(w.ln2_weight, w.ln2_bias, pools.ffn_x_prev, {&w.ffn_x_k});
  const Product key = product(load(w.ffn_key, kFfnWidth), mixed[0], Activation::kSquaredRelu);
  run({key});
  add(w.ffn_value, key.y);
  EXPECT_OK(memory.stream().Synchronize());  // Before the transposed factors go.
}

struct Result {
  Floats x;        // [rows, D]
  Floats v_first;  // [rows, A]
};

// Two blocks, one after the other, over packed rows that start from `pools`.
Result Compute(DeviceMemory& memory, const std::vector<SequenceSpan>& spans, const Floats& x,
               const std::vector<Pools>& pools) {
  const int64_t rows = static_cast<int64_t>(x.size()) / kWidth;
  const std::vector<int32_t> tokens(static_cast<size_t>(rows));
  const StepRows step = {rows, static_cast<int64_t>(spans.size()), memory.Put(absl::MakeConstSpan(spans)),
                         memory.Put(absl::MakeConstSpan(tokens))};
  float* const hidden = memory.Put(x);
  float* const v_first = memory.Zeros(rows * kChannels);
  for (int layer = 0; layer < 2; ++layer) {
    const Rwkv7BlockWeights weights = MakeWeights(static_cast<uint32_t>(100 + layer));
    RunBlock(memory, weights, layer == 0, step, pools[layer], hidden, v_first);
  }
  return {memory.Get(hidden, rows * kWidth), memory.Get(v_first, rows * kChannels)};
}

class BlockTest : public ::testing::TestWithParam<std::string> {
 protected:
  BlockTest() : memory_(OpenedDevice(GetParam())) {}

  std::vector<Pools> NewPools() { return {Pools(memory_), Pools(memory_)}; }

  DeviceMemory memory_;
};

TEST_P(BlockTest, EqualsThePaper) {
  const std::vector<int64_t> lengths = {5, 1, 9};
  const std::vector<SequenceSpan> spans = PackSpans(lengths, {2, 0, 3});
  Random random(31);
  const Floats x = random.Uniforms(15 * kWidth, -1.5f, 1.5f);
  const std::vector<Pools> pools = NewPools();
  const Result actual = Compute(memory_, spans, x, pools);

  const Rwkv7BlockWeights weights[2] = {MakeWeights(100), MakeWeights(101)};
  Floats expected_x;
  Floats expected_v_first;
  for (const SequenceSpan& span : spans) {
    Rwkv7BlockState states[2] = {reference::InitialState(weights[0]), reference::InitialState(weights[1])};
    for (int64_t row = span.row_begin; row < span.row_begin + span.row_count; ++row) {
      std::vector<double> hidden(x.begin() + row * kWidth, x.begin() + (row + 1) * kWidth);
      std::vector<double> v_first;
      for (int layer = 0; layer < 2; ++layer) {
        reference::Rwkv7Block(weights[layer], layer == 0, &states[layer], &hidden, &v_first);
      }
      expected_x.insert(expected_x.end(), hidden.begin(), hidden.end());
      expected_v_first.insert(expected_v_first.end(), v_first.begin(), v_first.end());
    }
    // Some twenty operations deep, sums of at most 70 terms, values below ten: 200 roundings of 10.
    const double tolerance = 200 * 10 * kUnitRoundoff;
    for (int layer = 0; layer < 2; ++layer) {
      const auto slice = [&](const float* pool, int64_t size) { return memory_.Get(pool + span.slot * size, size); };
      const auto narrow = [](const std::vector<double>& values) { return Floats(values.begin(), values.end()); };
      EXPECT_TRUE(AllClose(narrow(states[layer].att_x_prev), slice(pools[layer].att_x_prev, kWidth), tolerance));
      EXPECT_TRUE(
          AllClose(narrow(states[layer].att_state), slice(pools[layer].att_state, kChannels * kHeadSize), tolerance));
      EXPECT_TRUE(AllClose(narrow(states[layer].ffn_x_prev), slice(pools[layer].ffn_x_prev, kWidth), tolerance));
    }
    EXPECT_LT(*std::max_element(expected_x.begin(), expected_x.end()), 10.0f);
  }
  EXPECT_TRUE(AllClose(expected_v_first, actual.v_first, 200 * 10 * kUnitRoundoff));
  EXPECT_TRUE(AllClose(expected_x, actual.x, 200 * 10 * kUnitRoundoff));
}

// prefill(T) = T decodes, beside another sequence that is chunked in another way.
TEST_P(BlockTest, AnyChunkingHasTheSameBits) {
  constexpr int64_t kTokens = 17;
  Random random(37);
  const Floats first = random.Uniforms(kTokens * kWidth, -1.5f, 1.5f);
  const Floats second = random.Uniforms(kTokens * kWidth, -1.5f, 1.5f);
  const std::vector<Pools> whole_pools = NewPools();
  const Floats whole = Compute(memory_, PackSpans({kTokens}, {1}), first, whole_pools).x;

  for (const int64_t chunk : {1, 2, 5, 16}) {
    const std::vector<Pools> pools = NewPools();
    Floats chunked;
    int64_t other = 0;  // Tokens of the second sequence fed so far: one a step, packed before the first's.
    for (int64_t begin = 0; begin < kTokens; begin += chunk) {
      const int64_t count = std::min(chunk, kTokens - begin);
      Floats x(second.begin() + other * kWidth, second.begin() + (other + 1) * kWidth);
      ++other;
      x.insert(x.end(), first.begin() + begin * kWidth, first.begin() + (begin + count) * kWidth);
      const Floats y = Compute(memory_, PackSpans({1, count}, {3, 2}), x, pools).x;
      chunked.insert(chunked.end(), y.begin() + kWidth, y.end());
    }
    EXPECT_TRUE(SameBits(whole, chunked)) << "chunks of " << chunk;
    for (int layer = 0; layer < 2; ++layer) {
      const int64_t size = kChannels * kHeadSize;
      EXPECT_TRUE(SameBits(memory_.Get(whole_pools[layer].att_state + 1 * size, size),
                           memory_.Get(pools[layer].att_state + 2 * size, size)));
    }
  }
}

// What a numeric family promises: a sequence may move between machines that open different devices of it.
TEST_P(BlockTest, DevicesOfOneFamilyGiveTheSameBits) {
  Random random(41);
  const Floats x = random.Uniforms(14 * kWidth, -1.5f, 1.5f);
  const std::vector<SequenceSpan> spans = PackSpans({13, 1}, {2, 1});
  const std::vector<Pools> mine = NewPools();
  const Result a = Compute(memory_, spans, x, mine);
  for (const std::string& other : Backends()) {
    DeviceMemory memory(OpenedDevice(other));
    if (other == GetParam() || memory.device().numeric_family() != memory_.device().numeric_family()) continue;
    const std::vector<Pools> theirs = {Pools(memory), Pools(memory)};
    const Result b = Compute(memory, spans, x, theirs);
    EXPECT_TRUE(SameBits(a.x, b.x)) << other;
    EXPECT_TRUE(SameBits(a.v_first, b.v_first)) << other;
    for (int layer = 0; layer < 2; ++layer) {
      const int64_t size = kSlots * kChannels * kHeadSize;
      EXPECT_TRUE(SameBits(memory_.Get(mine[layer].att_state, size), memory.Get(theirs[layer].att_state, size)));
      EXPECT_TRUE(SameBits(memory_.Get(mine[layer].ffn_x_prev, kSlots * kWidth),
                           memory.Get(theirs[layer].ffn_x_prev, kSlots * kWidth)));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, BlockTest, ::testing::ValuesIn(Backends()),
                         [](const auto& info) { return TestName(info.param); });

}  // namespace
}  // namespace rwkv::kernels::conformance
