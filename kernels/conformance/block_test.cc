// A whole RWKV-7 block made of the operations, as a worker makes it, against reference::Rwkv7Block; and the laws of the
// whole.
#include "kernels/reference/block.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "kernels/api/layer_norm.h"
#include "kernels/api/matmul.h"
#include "kernels/api/op_table.h"
#include "kernels/api/sequence_span.h"
#include "kernels/api/token_shift.h"
#include "kernels/api/wkv7.h"
#include "kernels/api/wkv7_output.h"
#include "kernels/api/wkv7_prepare.h"
#include "kernels/base/dtype.h"
#include "kernels/base/host_device.h"
#include "kernels/conformance/conformance.h"
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

// States of all slots, packed as one pool a tensor.
struct Pools {
  Floats att_x_prev = Floats(kSlots * kWidth);
  Floats att_state = Floats(kSlots * kChannels * kHeadSize);
  Floats ffn_x_prev = Floats(kSlots * kWidth);
};

// The block by operations, for packed rows; x in and out.
class BlockOfOperations {
 public:
  BlockOfOperations(const OpTable& ops, const Rwkv7BlockWeights& weights, bool first_layer)
      : ops_(ops), weights_(weights), first_layer_(first_layer) {}

  void Run(absl::Span<const SequenceSpan> spans, Pools* pools, Floats* x, Floats* v_first) {
    const Rwkv7BlockWeights& w = weights_;
    rows_ = static_cast<int64_t>(x->size()) / kWidth;
    const Floats normed1 = LayerNorm(*x, w.ln1_weight, w.ln1_bias);
    const std::vector<Floats> shifted =
        TokenShift(spans, &pools->att_x_prev, normed1, {&w.x_r, &w.x_w, &w.x_k, &w.x_v, &w.x_a, &w.x_g});
    const Floats r = Matmul(shifted[0], w.receptance, kChannels);
    Floats k = Matmul(shifted[2], w.key, kChannels);
    Floats v = Matmul(shifted[3], w.value, kChannels);
    Floats decay = LowRank(shifted[1], w.w1, w.w2, Activation::kTanh);
    Floats iclr = LowRank(shifted[4], w.a1, w.a2, Activation::kNone);
    const Floats gate = LowRank(shifted[5], w.g1, w.g2, Activation::kSigmoid);
    const Floats value_gate = LowRank(shifted[3], w.v1, w.v2, Activation::kNone);
    Floats a(k.size());

    Wkv7PrepareArgs prepare;
    prepare.rows = rows_;
    prepare.heads = kHeads;
    prepare.head_size = kHeadSize;
    prepare.decay_bias = w.w0.data();
    prepare.iclr_bias = w.a0.data();
    prepare.k_k = w.k_k.data();
    prepare.k_a = w.k_a.data();
    prepare.decay_lora = decay.data();
    prepare.iclr_lora = iclr.data();
    if (first_layer_) {
      *v_first = v;
    } else {
      prepare.value_gate_bias = w.v0.data();
      prepare.value_gate_lora = value_gate.data();
      prepare.v_first = v_first->data();
    }
    prepare.k = k.data();
    prepare.v = v.data();
    prepare.w = decay.data();
    prepare.a = a.data();
    prepare.b = iclr.data();
    EXPECT_OK(ops_.wkv7_prepare(prepare, stream_));

    Floats y(k.size());
    Wkv7Args wkv;
    wkv.rows = rows_;
    wkv.heads = kHeads;
    wkv.head_size = kHeadSize;
    wkv.spans = spans.data();
    wkv.span_count = static_cast<int64_t>(spans.size());
    wkv.state_pool = pools->att_state.data();
    wkv.state_stride = kChannels * kHeadSize;
    wkv.state_slots = kSlots;
    wkv.r = r.data();
    wkv.w = decay.data();
    wkv.k = k.data();
    wkv.v = v.data();
    wkv.a = a.data();
    wkv.b = iclr.data();
    wkv.y = y.data();
    EXPECT_OK(ops_.wkv7(wkv, stream_));

    Wkv7OutputArgs output;
    output.rows = rows_;
    output.heads = kHeads;
    output.head_size = kHeadSize;
    output.ln_weight = w.ln_x_weight.data();
    output.ln_bias = w.ln_x_bias.data();
    output.bonus = w.r_k.data();
    output.y = y.data();
    output.r = r.data();
    output.k = k.data();
    output.v = v.data();
    output.g = gate.data();
    output.out = y.data();
    EXPECT_OK(ops_.wkv7_output(output, stream_));
    AddMatmul(y, w.output, kWidth, x);

    const Floats normed2 = LayerNorm(*x, w.ln2_weight, w.ln2_bias);
    const Floats mixed = TokenShift(spans, &pools->ffn_x_prev, normed2, {&w.ffn_x_k})[0];
    AddMatmul(Matmul(mixed, w.ffn_key, kFfnWidth, Activation::kSquaredRelu), w.ffn_value, kWidth, x);
  }

 private:
  Floats LayerNorm(const Floats& x, const Floats& weight, const Floats& bias) {
    Floats y(x.size());
    LayerNormArgs args;
    args.rows = rows_;
    args.width = kWidth;
    args.x = x.data();
    args.weight = weight.data();
    args.bias = bias.data();
    args.y = y.data();
    EXPECT_OK(ops_.layer_norm(args, stream_));
    return y;
  }

  std::vector<Floats> TokenShift(absl::Span<const SequenceSpan> spans, Floats* pool, const Floats& x,
                                 const std::vector<const Floats*>& mix) {
    std::vector<Floats> y(mix.size(), Floats(x.size()));
    TokenShiftArgs args;
    args.rows = rows_;
    args.width = kWidth;
    args.spans = spans.data();
    args.span_count = static_cast<int64_t>(spans.size());
    args.state_pool = pool->data();
    args.state_stride = kWidth;
    args.state_slots = kSlots;
    args.x = x.data();
    args.outputs = static_cast<int64_t>(mix.size());
    for (size_t m = 0; m < mix.size(); ++m) {
      args.mix[m] = mix[m]->data();
      args.y[m] = y[m].data();
    }
    EXPECT_OK(ops_.token_shift(args, stream_));
    return y;
  }

  void MatmulTo(const Floats& x, const Floats& weight, int64_t outputs, Activation activation, bool accumulate,
                Floats* y) {
    MatmulArgs args;
    args.rows = rows_;
    args.weight = {DType::kFloat32, outputs, static_cast<int64_t>(weight.size()) / outputs, weight.data()};
    args.x = x.data();
    args.activation = activation;
    args.accumulate = accumulate;
    args.y = y->data();
    EXPECT_OK(ops_.matmul(args, stream_));
  }

  Floats Matmul(const Floats& x, const Floats& weight, int64_t outputs, Activation activation = Activation::kNone) {
    Floats y(static_cast<size_t>(rows_ * outputs));
    MatmulTo(x, weight, outputs, activation, false, &y);
    return y;
  }

  void AddMatmul(const Floats& x, const Floats& weight, int64_t outputs, Floats* y) {
    MatmulTo(x, weight, outputs, Activation::kNone, true, y);
  }

  Floats LowRank(const Floats& x, const Floats& first, const Floats& second, Activation activation) {
    const int64_t rank = static_cast<int64_t>(first.size()) / kWidth;
    return Matmul(Matmul(x, Transpose(first, kWidth), rank, activation), Transpose(second, rank), kChannels);
  }

  const OpTable& ops_;
  const Rwkv7BlockWeights& weights_;
  const bool first_layer_;
  HostStream stream_;
  int64_t rows_ = 0;
};

struct Result {
  Floats x;        // [rows, D]
  Floats v_first;  // [rows, A]
  Pools pools;
};

// Two blocks, one after the other, over packed rows that start from `pools`.
Result Compute(const OpTable& ops, absl::Span<const SequenceSpan> spans, Floats x, std::vector<Pools>* pools) {
  Result result;
  for (int layer = 0; layer < 2; ++layer) {
    const Rwkv7BlockWeights weights = MakeWeights(static_cast<uint32_t>(100 + layer));
    BlockOfOperations(ops, weights, layer == 0).Run(spans, &(*pools)[layer], &x, &result.v_first);
  }
  result.x = x;
  return result;
}

class BlockTest : public ::testing::TestWithParam<const OpTable*> {};

TEST_P(BlockTest, EqualsThePaper) {
  const std::vector<int64_t> lengths = {5, 1, 9};
  const std::vector<SequenceSpan> spans = PackSpans(lengths, {2, 0, 3});
  Random random(31);
  const Floats x = random.Uniforms(15 * kWidth, -1.5f, 1.5f);
  std::vector<Pools> pools(2);
  const Result actual = Compute(*GetParam(), spans, x, &pools);

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
      const auto slice = [&](const Floats& pool, int64_t size) {
        return absl::MakeConstSpan(pool).subspan(static_cast<size_t>(span.slot * size), static_cast<size_t>(size));
      };
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
  std::vector<Pools> whole_pools(2);
  const Floats whole = Compute(*GetParam(), PackSpans({kTokens}, {1}), first, &whole_pools).x;

  for (const int64_t chunk : {1, 2, 5, 16}) {
    std::vector<Pools> pools(2);
    Floats chunked;
    int64_t other = 0;  // Tokens of the second sequence fed so far: one a step, packed before the first's.
    for (int64_t begin = 0; begin < kTokens; begin += chunk) {
      const int64_t count = std::min(chunk, kTokens - begin);
      Floats x(second.begin() + other * kWidth, second.begin() + (other + 1) * kWidth);
      ++other;
      x.insert(x.end(), first.begin() + begin * kWidth, first.begin() + (begin + count) * kWidth);
      const Floats y = Compute(*GetParam(), PackSpans({1, count}, {3, 2}), x, &pools).x;
      chunked.insert(chunked.end(), y.begin() + kWidth, y.end());
    }
    EXPECT_TRUE(SameBits(whole, chunked)) << "chunks of " << chunk;
    for (int layer = 0; layer < 2; ++layer) {
      const int64_t size = kChannels * kHeadSize;
      EXPECT_TRUE(SameBits(absl::MakeConstSpan(whole_pools[layer].att_state).subspan(1 * size, size),
                           absl::MakeConstSpan(pools[layer].att_state).subspan(2 * size, size)));
    }
  }
}

// What a numeric family promises: a sequence may move between machines that choose different tables of it.
TEST_P(BlockTest, TablesOfOneFamilyGiveTheSameBits) {
  Random random(41);
  const Floats x = random.Uniforms(14 * kWidth, -1.5f, 1.5f);
  for (const OpTable* other : Backends()) {
    if (other->numeric_family != GetParam()->numeric_family) continue;
    std::vector<Pools> mine(2);
    std::vector<Pools> theirs(2);
    const std::vector<SequenceSpan> spans = PackSpans({13, 1}, {2, 1});
    const Result a = Compute(*GetParam(), spans, x, &mine);
    const Result b = Compute(*other, spans, x, &theirs);
    EXPECT_TRUE(SameBits(a.x, b.x)) << other->name;
    EXPECT_TRUE(SameBits(a.v_first, b.v_first)) << other->name;
    for (int layer = 0; layer < 2; ++layer) {
      EXPECT_TRUE(SameBits(mine[layer].att_state, theirs[layer].att_state)) << other->name;
      EXPECT_TRUE(SameBits(mine[layer].ffn_x_prev, theirs[layer].ffn_x_prev)) << other->name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, BlockTest, ::testing::ValuesIn(Backends()),
                         [](const auto& info) { return TestName(info.param); });

}  // namespace
}  // namespace rwkv::kernels::conformance
