// Wkv7Prepare and Wkv7Output, what comes before and after the recurrence, of every backend against the reference; law
// N1.
#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/api/wkv7_output.h"
#include "kernels/api/wkv7_prepare.h"
#include "kernels/base/host_device.h"
#include "kernels/conformance/conformance.h"
#include "kernels/reference/reference.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::conformance {
namespace {

struct Case {
  std::string name;
  int64_t rows = 3;
  int64_t heads = 2;
  int64_t head_size = 64;
  float lora_range = 4.0f;  // of the arguments of the sigmoids
  float key_range = 1.0f;
  bool first_layer = false;  // no value residual
  bool in_place = false;     // outputs over the inputs they may share
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
  add("one_row", [](Case& c) { c.rows = 1; });
  add("many_rows", [](Case& c) { c.rows = 33; });
  add("one_head", [](Case& c) { c.heads = 1; });
  add("first_layer", [](Case& c) { c.first_layer = true; });
  add("in_place", [](Case& c) { c.in_place = true; });
  add("saturated", [](Case& c) { c.lora_range = 120.0f; });
  add("zero_key", [](Case& c) { c.key_range = 0.0f; });
  add("tiny_key", [](Case& c) { c.key_range = 1e-14f; });
  for (int64_t head_size : {1, 3, 8, 15, 16, 17, 32, 33}) {
    add("head_size_" + std::to_string(head_size), [=](Case& c) { c.head_size = head_size; });
  }
  return cases;
}

struct PrepareProblem {
  std::vector<float> decay_bias, iclr_bias, k_k, k_a, value_gate_bias;
  std::vector<float> decay_lora, iclr_lora, value_gate_lora, v_first, k, v;
};

PrepareProblem MakePrepareProblem(const Case& c) {
  Random random(23);
  const int64_t width = c.heads * c.head_size;
  const int64_t count = c.rows * width;
  PrepareProblem p;
  p.decay_bias = random.Uniforms(width, -6.0f, 1.0f);
  p.iclr_bias = random.Uniforms(width, -1.0f, 1.0f);
  p.k_k = random.Uniforms(width, 0.5f, 1.2f);
  p.k_a = random.Uniforms(width, 0.5f, 1.2f);
  p.value_gate_bias = random.Uniforms(width, -1.0f, 1.0f);
  p.decay_lora = random.Uniforms(count, -c.lora_range, c.lora_range);
  p.iclr_lora = random.Uniforms(count, -c.lora_range, c.lora_range);
  p.value_gate_lora = random.Uniforms(count, -c.lora_range, c.lora_range);
  p.v_first = random.Uniforms(count, -2.0f, 2.0f);
  p.k = random.Uniforms(count, -c.key_range, c.key_range);
  p.v = random.Uniforms(count, -2.0f, 2.0f);
  return p;
}

struct Prepared {
  std::vector<float> k, v, w, a, b;
};

// Rows [begin, begin + count) alone.
Prepared RunPrepare(Wkv7PrepareOp* op, const Case& c, const PrepareProblem& p, int64_t begin, int64_t count) {
  const int64_t width = c.heads * c.head_size;
  const auto rows = [&](const std::vector<float>& all) {
    return std::vector<float>(all.begin() + begin * width, all.begin() + (begin + count) * width);
  };
  std::vector<float> decay_lora = rows(p.decay_lora);
  std::vector<float> iclr_lora = rows(p.iclr_lora);
  const std::vector<float> value_gate_lora = rows(p.value_gate_lora);
  const std::vector<float> v_first = rows(p.v_first);
  Prepared out;
  out.k = rows(p.k);
  out.v = rows(p.v);
  out.w.resize(out.k.size());
  out.a.resize(out.k.size());
  out.b.resize(out.k.size());
  Wkv7PrepareArgs args;
  args.rows = count;
  args.heads = c.heads;
  args.head_size = c.head_size;
  args.decay_bias = p.decay_bias.data();
  args.iclr_bias = p.iclr_bias.data();
  args.k_k = p.k_k.data();
  args.k_a = p.k_a.data();
  args.decay_lora = decay_lora.data();
  args.iclr_lora = iclr_lora.data();
  if (!c.first_layer) {
    args.value_gate_bias = p.value_gate_bias.data();
    args.value_gate_lora = value_gate_lora.data();
    args.v_first = v_first.data();
  }
  args.k = out.k.data();
  args.v = out.v.data();
  args.w = c.in_place ? decay_lora.data() : out.w.data();
  args.a = out.a.data();
  args.b = c.in_place ? iclr_lora.data() : out.b.data();
  HostStream stream;
  EXPECT_OK(op(args, stream));
  if (c.in_place) {
    out.w = decay_lora;
    out.b = iclr_lora;
  }
  return out;
}

class Wkv7MixTest : public ::testing::TestWithParam<std::tuple<const OpTable*, Case>> {};

TEST_P(Wkv7MixTest, PrepareEqualsReference) {
  const auto& [table, c] = GetParam();
  const PrepareProblem p = MakePrepareProblem(c);
  const Prepared expected = RunPrepare(reference::Wkv7Prepare, c, p, 0, c.rows);
  const Prepared actual = RunPrepare(table->wkv7_prepare, c, p, 0, c.rows);
  // Both sides: the sigmoid's argument is rounded (relative to its size), the sigmoid and exp are off by a few units.
  const double function_error = 2 * (2 * kFunctionUlps * kUnitRoundoff);
  const double gate_error = function_error + 2 * kUnitRoundoff * (c.lora_range + 6.0) / 4;
  const double norm_error = static_cast<double>(c.head_size + 16) * kUnitRoundoff;
  EXPECT_TRUE(AllClose(expected.w, actual.w, gate_error + function_error));
  EXPECT_TRUE(AllClose(expected.a, actual.a, 2 * norm_error));  // |kappa_hat| <= 1
  EXPECT_TRUE(AllClose(expected.b, actual.b, 2 * norm_error + gate_error));
  EXPECT_TRUE(AllClose(expected.k, actual.k, c.key_range * (1.2 * gate_error + 8 * kUnitRoundoff)));
  EXPECT_TRUE(AllClose(expected.v, actual.v, 4.0 * gate_error + 16 * kUnitRoundoff));
}

TEST_P(Wkv7MixTest, PrepareIsAsTheFormulaSays) {
  const auto& [table, c] = GetParam();
  const PrepareProblem p = MakePrepareProblem(c);
  const Prepared actual = RunPrepare(table->wkv7_prepare, c, p, 0, c.rows);
  for (float w : actual.w) {
    EXPECT_GE(w, 0.5452f);
    EXPECT_LE(w, 1.0f);
  }
  const int64_t n = c.head_size;
  for (int64_t head = 0; head < c.rows * c.heads; ++head) {
    double squares = 0.0;
    for (int64_t j = 0; j < n; ++j) squares += static_cast<double>(actual.a[head * n + j]) * actual.a[head * n + j];
    if (c.key_range == 0.0f) {
      EXPECT_EQ(squares, 0.0);
    } else if (c.key_range >= 1e-3f) {
      EXPECT_NEAR(squares, 1.0, 1e-5);
    }
  }
  if (c.first_layer) EXPECT_TRUE(SameBits(p.v, actual.v));
}

TEST_P(Wkv7MixTest, PrepareOfRowAloneHasTheBitsOfRowInBatch) {
  const auto& [table, c] = GetParam();
  const PrepareProblem p = MakePrepareProblem(c);
  const Prepared whole = RunPrepare(table->wkv7_prepare, c, p, 0, c.rows);
  Prepared rows;
  for (int64_t row = 0; row < c.rows; ++row) {
    const Prepared one = RunPrepare(table->wkv7_prepare, c, p, row, 1);
    for (auto member : {&Prepared::k, &Prepared::v, &Prepared::w, &Prepared::a, &Prepared::b}) {
      (rows.*member).insert((rows.*member).end(), (one.*member).begin(), (one.*member).end());
    }
  }
  for (auto member : {&Prepared::k, &Prepared::v, &Prepared::w, &Prepared::a, &Prepared::b}) {
    EXPECT_TRUE(SameBits(whole.*member, rows.*member));
  }
}

struct OutputProblem {
  std::vector<float> ln_weight, ln_bias, bonus;
  std::vector<float> y, r, k, v, g;
};

OutputProblem MakeOutputProblem(const Case& c) {
  Random random(29);
  const int64_t width = c.heads * c.head_size;
  const int64_t count = c.rows * width;
  OutputProblem p;
  p.ln_weight = random.Uniforms(width, 0.2f, 1.5f);
  p.ln_bias = random.Uniforms(width, -0.5f, 0.5f);
  p.bonus = random.Uniforms(width, -0.5f, 0.5f);
  p.y = random.Uniforms(count, -1.5f, 2.0f);
  p.r = random.Uniforms(count, -1.0f, 1.0f);
  p.k = random.Uniforms(count, -c.key_range, c.key_range);
  p.v = random.Uniforms(count, -1.0f, 1.0f);
  p.g = random.Uniforms(count, -1.0f, 1.0f);
  if (c.key_range == 0.0f) std::fill(p.y.begin(), p.y.end(), 0.0f);  // what a head without a key reads
  return p;
}

std::vector<float> RunOutput(Wkv7OutputOp* op, const Case& c, const OutputProblem& p, int64_t begin, int64_t count) {
  const int64_t width = c.heads * c.head_size;
  const auto rows = [&](const std::vector<float>& all) {
    return std::vector<float>(all.begin() + begin * width, all.begin() + (begin + count) * width);
  };
  std::vector<float> y = rows(p.y);
  const std::vector<float> r = rows(p.r);
  const std::vector<float> k = rows(p.k);
  const std::vector<float> v = rows(p.v);
  const std::vector<float> g = rows(p.g);
  std::vector<float> out(y.size());
  Wkv7OutputArgs args;
  args.rows = count;
  args.heads = c.heads;
  args.head_size = c.head_size;
  args.ln_weight = p.ln_weight.data();
  args.ln_bias = p.ln_bias.data();
  args.bonus = p.bonus.data();
  args.y = y.data();
  args.r = r.data();
  args.k = k.data();
  args.v = v.data();
  args.g = g.data();
  args.out = c.in_place ? y.data() : out.data();
  HostStream stream;
  EXPECT_OK(op(args, stream));
  return c.in_place ? y : out;
}

// As for LayerNorm, plus a sum of N products times v; |v|, |g|, |r|, |k| <= 1, |bonus| <= 0.5, |y| <= 2.
std::vector<double> OutputTolerance(const Case& c, const OutputProblem& p) {
  const int64_t n = c.head_size;
  std::vector<double> tolerance;
  for (int64_t head = 0; head < c.rows * c.heads; ++head) {
    double mean = 0.0;
    for (int64_t j = 0; j < n; ++j) mean += p.y[head * n + j] / static_cast<double>(n);
    double variance = 0.0;
    for (int64_t j = 0; j < n; ++j) variance += std::pow(p.y[head * n + j] - mean, 2) / static_cast<double>(n);
    const double scale = 1.0 / std::sqrt(variance + 64e-5);
    const double bonus = 0.5 * static_cast<double>(n) * c.key_range;
    for (int64_t j = 0; j < n; ++j) {
      tolerance.push_back(2 * static_cast<double>(n + 8) * kUnitRoundoff * (1.5 * 4.0 * scale + 0.5 + bonus));
    }
  }
  return tolerance;
}

TEST_P(Wkv7MixTest, OutputEqualsReference) {
  const auto& [table, c] = GetParam();
  const OutputProblem p = MakeOutputProblem(c);
  EXPECT_TRUE(AllClose(RunOutput(reference::Wkv7Output, c, p, 0, c.rows),
                       RunOutput(table->wkv7_output, c, p, 0, c.rows), OutputTolerance(c, p)));
}

TEST_P(Wkv7MixTest, OutputOfRowAloneHasTheBitsOfRowInBatch) {
  const auto& [table, c] = GetParam();
  const OutputProblem p = MakeOutputProblem(c);
  std::vector<float> rows;
  for (int64_t row = 0; row < c.rows; ++row) {
    const std::vector<float> one = RunOutput(table->wkv7_output, c, p, row, 1);
    rows.insert(rows.end(), one.begin(), one.end());
  }
  EXPECT_TRUE(SameBits(RunOutput(table->wkv7_output, c, p, 0, c.rows), rows));
}

INSTANTIATE_TEST_SUITE_P(Backends, Wkv7MixTest,
                         ::testing::Combine(::testing::ValuesIn(Backends()), ::testing::ValuesIn(Cases())),
                         [](const auto& info) {
                           return TestName(std::get<0>(info.param)) + "_" + std::get<1>(info.param).name;
                         });

}  // namespace
}  // namespace rwkv::kernels::conformance
