// DeepEmbed of every backend against the reference, and law N1.
#include "kernels/api/deep_embed.h"

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/api/op_table.h"
#include "kernels/base/dtype.h"
#include "kernels/base/host_device.h"
#include "kernels/conformance/conformance.h"
#include "kernels/reference/reference.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::conformance {
namespace {

constexpr int64_t kVocabulary = 5;

struct Case {
  std::string name;
  int64_t width = 32;
  std::vector<int32_t> tokens = {4, 0, 4};
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
  add("one_row", [](Case& c) { c.tokens = {2}; });
  for (int64_t width : {1, 5, 16, 17}) add("width_" + std::to_string(width), [=](Case& c) { c.width = width; });
  for (const Storage& storage : Storages()) {
    add(storage.name, [=](Case& c) { c.storage = storage; });
    add(storage.name + "_odd", [=](Case& c) { c.storage = storage, c.width = 9; });
  }
  return cases;
}

struct Problem {
  StoredMatrix table;
  std::vector<float> x;
};

Problem MakeProblem(const Case& c) {
  Random random(59);
  const int64_t cols = c.width * c.width;
  return {StoredMatrix(c.storage, kVocabulary, cols, random.Uniforms(kVocabulary * cols, -1.0f, 1.0f)),
          random.Uniforms(static_cast<int64_t>(c.tokens.size()) * c.width, -2.0f, 2.0f)};
}

// Rows [begin, begin + count) alone.
std::vector<float> Compute(DeepEmbedOp* op, const Case& c, const Problem& p, int64_t begin, int64_t count) {
  std::vector<float> y(static_cast<size_t>(count * c.width));
  DeepEmbedArgs args;
  args.rows = count;
  args.width = c.width;
  args.tokens = c.tokens.data() + begin;
  args.table = p.table.view();
  args.x = p.x.data() + begin * c.width;
  args.y = y.data();
  HostStream stream;
  EXPECT_OK(op(args, stream));
  return y;
}

class DeepEmbedTest : public ::testing::TestWithParam<std::tuple<const OpTable*, Case>> {};

// A sum of n products, each side in its own order.
TEST_P(DeepEmbedTest, EqualsReference) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  const auto rows = static_cast<int64_t>(c.tokens.size());
  std::vector<double> tolerance;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t j = 0; j < c.width; ++j) {
      double magnitude = 0.0;
      for (int64_t i = 0; i < c.width; ++i) {
        magnitude += std::abs(static_cast<double>(p.x[row * c.width + i]) *
                              p.table.widened[(c.tokens[row] * c.width + i) * c.width + j]);
      }
      tolerance.push_back(2 * static_cast<double>(c.width + 1) * kUnitRoundoff * magnitude);
    }
  }
  EXPECT_TRUE(
      AllClose(Compute(reference::DeepEmbed, c, p, 0, rows), Compute(table->deep_embed, c, p, 0, rows), tolerance));
}

TEST_P(DeepEmbedTest, RowAloneHasTheBitsOfRowInBatch) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  const auto rows = static_cast<int64_t>(c.tokens.size());
  std::vector<float> alone;
  for (int64_t row = 0; row < rows; ++row) {
    const std::vector<float> one = Compute(table->deep_embed, c, p, row, 1);
    alone.insert(alone.end(), one.begin(), one.end());
  }
  EXPECT_TRUE(SameBits(Compute(table->deep_embed, c, p, 0, rows), alone));
}

TEST_P(DeepEmbedTest, TablesOfOneFamilyGiveTheSameBits) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  const auto rows = static_cast<int64_t>(c.tokens.size());
  for (const OpTable* other : Backends()) {
    if (other->numeric_family != table->numeric_family) continue;
    EXPECT_TRUE(SameBits(Compute(table->deep_embed, c, p, 0, rows), Compute(other->deep_embed, c, p, 0, rows)))
        << other->name;
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, DeepEmbedTest,
                         ::testing::Combine(::testing::ValuesIn(Backends()), ::testing::ValuesIn(Cases())),
                         [](const auto& info) {
                           return TestName(std::get<0>(info.param)) + "_" + std::get<1>(info.param).name;
                         });

}  // namespace
}  // namespace rwkv::kernels::conformance
