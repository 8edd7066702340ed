// GroupNorm of every backend against the reference, and law N1.
#include "kernels/api/group_norm.h"

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/api/op_table.h"
#include "kernels/base/host_device.h"
#include "kernels/conformance/conformance.h"
#include "kernels/reference/reference.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::conformance {
namespace {

enum class Out { kApart, kOverY, kOverGate };

struct Case {
  std::string name;
  int64_t rows = 3;
  int64_t heads = 2;
  int64_t head_size = 64;
  float epsilon = 64e-5f;
  float spread = 2.0f;
  bool gate = true;
  Out out = Out::kApart;
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
  add("no_gate", [](Case& c) { c.gate = false; });
  add("no_gate_over_y", [](Case& c) { c.gate = false, c.out = Out::kOverY; });
  add("over_y", [](Case& c) { c.out = Out::kOverY; });
  add("over_gate", [](Case& c) { c.out = Out::kOverGate; });
  add("epsilon_of_rwkv_cpp", [](Case& c) { c.epsilon = 1e-5f, c.spread = 0.01f; });
  add("smaller_than_epsilon", [](Case& c) { c.spread = 1e-4f; });
  add("zeros", [](Case& c) { c.spread = 0.0f; });
  for (int64_t head_size : {1, 3, 8, 15, 16, 17, 32, 33}) {
    add("head_size_" + std::to_string(head_size), [=](Case& c) { c.head_size = head_size; });
  }
  return cases;
}

struct Problem {
  std::vector<float> weight, bias;
  std::vector<float> y, gate;
};

Problem MakeProblem(const Case& c) {
  Random random(53);
  const int64_t width = c.heads * c.head_size;
  Problem p;
  p.weight = random.Uniforms(width, 0.2f, 1.5f);
  p.bias = random.Uniforms(width, -0.5f, 0.5f);
  p.y = random.Uniforms(c.rows * width, -c.spread, c.spread);
  p.gate = random.Uniforms(c.rows * width, -1.0f, 1.0f);
  return p;
}

// Rows [begin, begin + count) alone.
std::vector<float> Compute(GroupNormOp* op, const Case& c, const Problem& p, int64_t begin, int64_t count) {
  const int64_t width = c.heads * c.head_size;
  std::vector<float> y(p.y.begin() + begin * width, p.y.begin() + (begin + count) * width);
  std::vector<float> gate(p.gate.begin() + begin * width, p.gate.begin() + (begin + count) * width);
  std::vector<float> apart(y.size());
  std::vector<float>& out = c.out == Out::kOverY ? y : c.out == Out::kOverGate ? gate : apart;
  GroupNormArgs args;
  args.rows = count;
  args.heads = c.heads;
  args.head_size = c.head_size;
  args.y = y.data();
  args.weight = p.weight.data();
  args.bias = p.bias.data();
  args.epsilon = c.epsilon;
  if (c.gate) args.gate = gate.data();
  args.out = out.data();
  HostStream stream;
  EXPECT_OK(op(args, stream));
  return out;
}

// As for LayerNorm: the mean is off by at most N roundings of the largest |y|, the scale by as many of itself.
std::vector<double> Tolerance(const Case& c, const Problem& p) {
  const int64_t n = c.head_size;
  std::vector<double> tolerance;
  for (int64_t head = 0; head < c.rows * c.heads; ++head) {
    double mean = 0.0;
    for (int64_t j = 0; j < n; ++j) mean += p.y[head * n + j] / static_cast<double>(n);
    double variance = 0.0;
    for (int64_t j = 0; j < n; ++j) variance += std::pow(p.y[head * n + j] - mean, 2) / static_cast<double>(n);
    const double scale = 1.0 / std::sqrt(variance + static_cast<double>(c.epsilon));
    for (int64_t j = 0; j < n; ++j) {
      const double spread = (c.spread + std::abs(p.y[head * n + j] - mean)) * scale;
      tolerance.push_back(2 * static_cast<double>(n + 10) * kUnitRoundoff * (spread * 1.5 + 0.5));
    }
  }
  return tolerance;
}

class GroupNormTest : public ::testing::TestWithParam<std::tuple<const OpTable*, Case>> {};

TEST_P(GroupNormTest, EqualsReference) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  EXPECT_TRUE(AllClose(Compute(reference::GroupNorm, c, p, 0, c.rows), Compute(table->group_norm, c, p, 0, c.rows),
                       Tolerance(c, p)));
}

TEST_P(GroupNormTest, PlaceOfTheOutputIsFree) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  Case apart = c;
  apart.out = Out::kApart;
  EXPECT_TRUE(SameBits(Compute(table->group_norm, apart, p, 0, c.rows), Compute(table->group_norm, c, p, 0, c.rows)));
}

TEST_P(GroupNormTest, RowAloneHasTheBitsOfRowInBatch) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  std::vector<float> rows;
  for (int64_t row = 0; row < c.rows; ++row) {
    const std::vector<float> one = Compute(table->group_norm, c, p, row, 1);
    rows.insert(rows.end(), one.begin(), one.end());
  }
  EXPECT_TRUE(SameBits(Compute(table->group_norm, c, p, 0, c.rows), rows));
}

TEST_P(GroupNormTest, TablesOfOneFamilyGiveTheSameBits) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  for (const OpTable* other : Backends()) {
    if (other->numeric_family != table->numeric_family) continue;
    EXPECT_TRUE(SameBits(Compute(table->group_norm, c, p, 0, c.rows), Compute(other->group_norm, c, p, 0, c.rows)))
        << other->name;
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, GroupNormTest,
                         ::testing::Combine(::testing::ValuesIn(Backends()), ::testing::ValuesIn(Cases())),
                         [](const auto& info) {
                           return TestName(std::get<0>(info.param)) + "_" + std::get<1>(info.param).name;
                         });

}  // namespace
}  // namespace rwkv::kernels::conformance
