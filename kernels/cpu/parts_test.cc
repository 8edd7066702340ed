// Operations computed in other parts than a device cuts, and in another order, have the same bits: threads may take any
// part at any time.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/api/mix_input.h"
#include "kernels/api/products.h"
#include "kernels/api/sequence_span.h"
#include "kernels/api/step_rows.h"
#include "kernels/api/wkv4.h"
#include "kernels/api/wkv6.h"
#include "kernels/api/wkv7.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/kernel_set.h"

namespace rwkv::kernels::cpu {
namespace {

using Floats = std::vector<float>;

constexpr int64_t kRows = 20;
constexpr int64_t kSlots = 4;
constexpr int64_t kHeads = 3;
constexpr int64_t kHeadSize = 20;
constexpr int64_t kWidth = kHeads * kHeadSize;

Floats Uniforms(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  Floats values(static_cast<size_t>(count));
  for (float& value : values) value = static_cast<float>(generator() >> 8) * 0x1p-23f - 1.0f;
  return values;
}

// The step, the memory all operations share, and what they write.
struct Problem {
  Problem() {
    step = {kRows, static_cast<int64_t>(spans.size()), spans.data(), tokens.data()};
    for (uint32_t i = 0; i < 8; ++i) inputs.push_back(Uniforms(kRows * kWidth, i + 1));
  }

  std::vector<SequenceSpan> spans = {{2, 0, 9}, {kPaddingSlot, 9, 2}, {0, 11, 8}, {3, 19, 1}};
  std::vector<int32_t> tokens = std::vector<int32_t>(kRows);
  StepRows step;
  std::vector<Floats> inputs;
  Floats weights = Uniforms(kWidth, 99);
  Floats state = Uniforms(kSlots * kWidth * kHeadSize, 77);
  Floats more_state = Floats(kSlots * kWidth, 0.5f);
  Floats y = Floats(2 * kRows * kWidth);
};

// Calls work for each part, backwards if told so.
void EachOf(int64_t parts, bool backwards, const std::function<void(int64_t)>& work) {
  for (int64_t part = 0; part < parts; ++part) work(backwards ? parts - 1 - part : part);
}

// An operation, in parts of some size.
using Operation = std::function<void(const KernelSet& kernels, int64_t size, bool backwards, Problem& p)>;

void RunMixInput(const KernelSet& kernels, int64_t size, bool backwards, Problem& p) {
  MixInputArgs args;
  args.step = &p.step;
  args.width = kWidth;
  args.x = p.inputs[0].data();
  args.weight = args.bias = p.weights.data();
  args.shift = {p.state.data(), kWidth};
  args.outputs = 2;
  args.mix[0] = args.mix[1] = p.weights.data();
  args.mix_delta[1] = p.inputs[1].data();
  args.y[0] = p.y.data();
  args.y[1] = p.y.data() + kRows * kWidth;
  EachOf((kRows + size - 1) / size, backwards, [&](int64_t part) {
    Floats scratch(2 * kWidth);
    kernels.mix_input(args, part * size, std::min(part * size + size, kRows), scratch.data());
  });
  for (const SequenceSpan& span : p.spans) {
    const int64_t last = span.row_begin + span.row_count - 1;
    if (span.slot != kPaddingSlot && span.row_begin / size != last / size) kernels.mix_input_state(args, span);
  }
}

void RunWkv4(const KernelSet& kernels, int64_t size, bool backwards, Problem& p) {
  Wkv4Args args;
  args.step = &p.step;
  args.width = kWidth;
  args.aa = {p.state.data(), kWidth};
  args.pp = {p.state.data() + kSlots * kWidth, kWidth};
  args.bb = {p.more_state.data(), kWidth};
  args.decay = args.bonus = p.weights.data();
  args.r = p.inputs[0].data();
  args.k = p.inputs[1].data();
  args.v = p.inputs[2].data();
  args.y = p.y.data();
  EachOf((kWidth + 16 * size - 1) / (16 * size), backwards, [&](int64_t part) {
    for (const SequenceSpan& span : p.spans) {
      kernels.wkv4(args, span, part * 16 * size, std::min((part + 1) * 16 * size, kWidth));
    }
  });
}

void RunWkv6(const KernelSet& kernels, int64_t, bool backwards, Problem& p) {
  Wkv6Args args;
  args.step = &p.step;
  args.heads = kHeads;
  args.head_size = kHeadSize;
  args.state = {p.state.data(), kWidth * kHeadSize};
  args.bonus = args.ln_weight = args.ln_bias = p.weights.data();
  args.r = p.inputs[0].data();
  args.w = p.inputs[1].data();
  args.k = p.inputs[2].data();
  args.v = p.inputs[3].data();
  args.y = p.y.data();
  EachOf(kHeads * p.step.span_count, backwards,
         [&](int64_t part) { kernels.wkv6(args, p.spans[part / kHeads], part % kHeads); });
}

void RunWkv7(const KernelSet& kernels, int64_t, bool backwards, Problem& p) {
  Wkv7Args args;
  args.step = &p.step;
  args.heads = kHeads;
  args.head_size = kHeadSize;
  args.state = {p.state.data(), kWidth * kHeadSize};
  args.decay_bias = args.iclr_bias = args.k_k = args.k_a = args.bonus = args.ln_weight = args.ln_bias =
      args.value_gate_bias = p.weights.data();
  args.r = p.inputs[0].data();
  args.k = p.inputs[1].data();
  args.v = p.inputs[2].data();
  args.g = p.inputs[3].data();
  args.decay_lora = p.inputs[4].data();
  args.iclr_lora = p.inputs[5].data();
  args.value_gate_lora = p.inputs[6].data();
  args.v_first = p.inputs[7].data();
  args.y = p.y.data();
  EachOf(kHeads * p.step.span_count, backwards, [&](int64_t part) {
    alignas(64) float scratch[1024];
    ASSERT_LE(kernels.wkv7_scratch_floats(kHeadSize), 1024);
    kernels.wkv7(args, p.spans[part / kHeads], part % kHeads, scratch);
  });
}

struct alignas(64) Line {
  std::array<float, 16> floats;
};

// Products with one row, a few and many; the workspace holds what another part left there.
void RunProducts(const KernelSet& kernels, int64_t, bool backwards, Problem& p) {
  MatmulArgs args;
  args.weight.rows = 30 * kWidth + 1;  // More than one part.
  args.weight.cols = kWidth;
  args.x = p.inputs[0].data();
  const Floats bias = Uniforms(args.weight.rows, 44);
  args.bias = bias.data();
  args.activation = Activation::kSilu;
  const Floats weights = Uniforms(args.weight.rows * kWidth, 55);
  args.weight.data = weights.data();
  p.more_state.assign(static_cast<size_t>(2 * kRows * args.weight.rows), 0.0f);
  float* y = p.more_state.data();
  for (const int64_t rows : {int64_t{1}, int64_t{5}, kRows}) {
    args.rows = rows;
    args.y = y;
    std::vector<Line> prepared(static_cast<size_t>(kernels.matmul_prepared_bytes(args) / 64 + 1));
    args.prepared = prepared.data();
    if (kernels.matmul_prepared_bytes(args) > 0) kernels.prepare_rows(args, 0, rows);
    std::vector<Line> workspace(static_cast<size_t>(kernels.matmul_workspace_bytes(args) / 64 + 1));
    EachOf(kernels.matmul_parts(args), backwards, [&](int64_t part) {
      kernels.matmul(args, part, workspace.data());
      for (Line& line : workspace) line.floats.fill(std::numeric_limits<float>::quiet_NaN());
    });
    y += rows * args.weight.rows;
  }
}

bool SameBits(const Floats& a, const Floats& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

class PartsTest : public ::testing::TestWithParam<size_t> {};

TEST_P(PartsTest, AnyPartsInAnyOrderHaveTheSameBits) {
  const Backend backend = Backends()[GetParam()];
  if (!backend.runs_here) GTEST_SKIP() << backend.name << " cannot run on this processor";
  const std::vector<std::pair<std::string, Operation>> operations = {
      {"mix_input", RunMixInput}, {"wkv4", RunWkv4}, {"wkv6", RunWkv6}, {"wkv7", RunWkv7}, {"products", RunProducts}};
  for (const auto& [name, run] : operations) {
    Problem whole;
    run(*backend.kernels, kRows, false, whole);
    for (const int64_t size : {1, 2, 3, 8, 20}) {
      Problem parts;
      run(*backend.kernels, size, true, parts);
      EXPECT_TRUE(SameBits(whole.y, parts.y)) << name << " in parts of " << size;
      EXPECT_TRUE(SameBits(whole.state, parts.state)) << name << " in parts of " << size;
      EXPECT_TRUE(SameBits(whole.more_state, parts.more_state)) << name << " in parts of " << size;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, PartsTest, ::testing::Range<size_t>(0, Backends().size()), [](const auto& info) {
  std::string name(Backends()[info.param].name.substr(4));  // Without "cpu/".
  std::replace(name.begin(), name.end(), '/', '_');
  return name;
});

}  // namespace
}  // namespace rwkv::kernels::cpu
