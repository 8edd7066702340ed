// LayerNorm and Embed of every backend against the reference, and law N1.
#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/api/embed.h"
#include "kernels/api/layer_norm.h"
#include "kernels/base/dtype.h"
#include "kernels/base/host_device.h"
#include "kernels/conformance/conformance.h"
#include "kernels/reference/reference.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::conformance {
namespace {

struct Case {
  std::string name;
  int64_t rows = 3;
  int64_t width = 64;
  float center = 0.3f;  // of the inputs, which spread by `spread` around it
  float spread = 2.0f;
  Storage storage = {"bf16", DType::kBFloat16};  // of the embedding
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
  for (int64_t width : {1, 2, 15, 16, 17, 40, 768}) {
    add("width_" + std::to_string(width), [=](Case& c) { c.width = width; });
  }
  add("far_from_zero", [](Case& c) { c.center = 50.0f; });
  add("smaller_than_epsilon", [](Case& c) { c.center = 0.0f, c.spread = 1e-4f; });
  add("constant", [](Case& c) { c.spread = 0.0f; });
  for (const Storage& storage : Storages()) {
    add(storage.name, [=](Case& c) { c.storage = storage; });
    add(storage.name + "_tail", [=](Case& c) { c.storage = storage, c.width = 21; });
    add(storage.name + "_odd_groups", [=](Case& c) { c.storage = storage, c.width = 85; });
  }
  for (const Storage& storage : BlockStorages())
    add(storage.name, [=](Case& c) { c.storage = storage, c.width = 512; });
  return cases;
}

struct Problem {
  std::vector<float> x;
  std::vector<float> weight;
  std::vector<float> bias;
};

Problem MakeProblem(const Case& c) {
  Random random(11);
  Problem p;
  p.x = random.Uniforms(c.rows * c.width, c.center - c.spread, c.center + c.spread);
  p.weight = random.Uniforms(c.width, 0.2f, 1.5f);
  p.bias = random.Uniforms(c.width, -0.5f, 0.5f);
  return p;
}

std::vector<float> RunLayerNorm(LayerNormOp* op, const Case& c, const Problem& p, int64_t begin, int64_t count,
                                bool in_place) {
  std::vector<float> x(p.x.begin() + begin * c.width, p.x.begin() + (begin + count) * c.width);
  std::vector<float> y(x.size());
  LayerNormArgs args;
  args.rows = count;
  args.width = c.width;
  args.x = x.data();
  args.weight = p.weight.data();
  args.bias = p.bias.data();
  args.y = in_place ? x.data() : y.data();
  HostStream stream;
  EXPECT_OK(op(args, stream));
  return in_place ? x : y;
}

// The mean is off by at most width roundings of the largest |x|, the scale by as many of itself.
std::vector<double> Tolerance(const Case& c, const Problem& p, const std::vector<float>& x) {
  std::vector<double> tolerance;
  for (size_t begin = 0; begin < x.size(); begin += static_cast<size_t>(c.width)) {
    double mean = 0.0;
    double largest = 0.0;
    for (int64_t i = 0; i < c.width; ++i) {
      mean += x[begin + i] / static_cast<double>(c.width);
      largest = std::max(largest, std::abs(static_cast<double>(x[begin + i])));
    }
    double variance = 0.0;
    for (int64_t i = 0; i < c.width; ++i) {
      variance += (x[begin + i] - mean) * (x[begin + i] - mean) / static_cast<double>(c.width);
    }
    const double scale = 1.0 / std::sqrt(variance + 1e-5);
    for (int64_t i = 0; i < c.width; ++i) {
      const double spread = (largest + std::abs(x[begin + i] - mean)) * scale;
      tolerance.push_back(2 * static_cast<double>(c.width + 8) * kUnitRoundoff *
                          (spread * p.weight[i] + std::abs(p.bias[i])));
    }
  }
  return tolerance;
}

class NormTest : public ::testing::TestWithParam<std::tuple<const OpTable*, Case>> {};

TEST_P(NormTest, LayerNormEqualsReference) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  const std::vector<float> expected = RunLayerNorm(reference::LayerNorm, c, p, 0, c.rows, false);
  EXPECT_TRUE(AllClose(expected, RunLayerNorm(table->layer_norm, c, p, 0, c.rows, false), Tolerance(c, p, p.x)));
}

TEST_P(NormTest, LayerNormInPlaceHasTheSameBits) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  EXPECT_TRUE(SameBits(RunLayerNorm(table->layer_norm, c, p, 0, c.rows, false),
                       RunLayerNorm(table->layer_norm, c, p, 0, c.rows, true)));
}

TEST_P(NormTest, LayerNormOfRowAloneHasTheBitsOfRowInBatch) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  std::vector<float> rows;
  for (int64_t row = 0; row < c.rows; ++row) {
    const std::vector<float> one = RunLayerNorm(table->layer_norm, c, p, row, 1, false);
    rows.insert(rows.end(), one.begin(), one.end());
  }
  EXPECT_TRUE(SameBits(RunLayerNorm(table->layer_norm, c, p, 0, c.rows, false), rows));
}

std::vector<float> RunEmbed(EmbedOp* op, const Case& c, const Problem& p, const StoredMatrix& embedding,
                            const std::vector<int32_t>& tokens, bool norm) {
  std::vector<float> x(tokens.size() * static_cast<size_t>(c.width));
  EmbedArgs args;
  args.rows = static_cast<int64_t>(tokens.size());
  args.tokens = tokens.data();
  args.embedding = embedding.view();
  args.weight = norm ? p.weight.data() : nullptr;
  args.bias = norm ? p.bias.data() : nullptr;
  args.x = x.data();
  HostStream stream;
  EXPECT_OK(op(args, stream));
  return x;
}

TEST_P(NormTest, EmbedEqualsReference) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  const StoredMatrix embedding(c.storage, c.rows, c.width, p.x);
  const auto last = static_cast<int32_t>(c.rows - 1);
  const std::vector<int32_t> tokens = {last, 0, last};
  std::vector<float> gathered;
  for (int32_t token : tokens) {
    const auto begin = embedding.widened.begin() + token * c.width;
    gathered.insert(gathered.end(), begin, begin + c.width);
  }
  EXPECT_TRUE(SameBits(gathered, RunEmbed(table->embed, c, p, embedding, tokens, false)));
  EXPECT_TRUE(AllClose(RunEmbed(reference::Embed, c, p, embedding, tokens, true),
                       RunEmbed(table->embed, c, p, embedding, tokens, true), Tolerance(c, p, gathered)));
}

TEST_P(NormTest, EmbedHasTheBitsOfLayerNormOfTheRow) {
  const auto& [table, c] = GetParam();
  Problem p = MakeProblem(c);
  const StoredMatrix embedding(c.storage, c.rows, c.width, p.x);
  std::vector<int32_t> tokens(static_cast<size_t>(c.rows));
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i);
  const std::vector<float> embedded = RunEmbed(table->embed, c, p, embedding, tokens, true);
  p.x = embedding.widened;
  EXPECT_TRUE(SameBits(RunLayerNorm(table->layer_norm, c, p, 0, c.rows, false), embedded));
}

INSTANTIATE_TEST_SUITE_P(Backends, NormTest,
                         ::testing::Combine(::testing::ValuesIn(Backends()), ::testing::ValuesIn(Cases())),
                         [](const auto& info) {
                           return TestName(std::get<0>(info.param)) + "_" + std::get<1>(info.param).name;
                         });

}  // namespace
}  // namespace rwkv::kernels::conformance
