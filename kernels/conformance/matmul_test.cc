// Matmul of every backend against the reference, and law N1.
#include "kernels/api/matmul.h"

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "kernels/base/host_device.h"
#include "kernels/conformance/conformance.h"
#include "kernels/reference/reference.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::conformance {
namespace {

struct Case {
  std::string name;
  int64_t rows = 5;
  int64_t inputs = 64;
  int64_t outputs = 12;
  Storage storage = {"bf16", DType::kBFloat16};
  Activation activation = Activation::kNone;
  bool bias = false;
  bool gate = false;
  bool in_place = false;  // y is the gate
  bool accumulate = false;
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
  for (int64_t rows : {1, 2, 3, 4, 6, 7, 8, 13, 33}) {
    add("rows_" + std::to_string(rows), [=](Case& c) { c.rows = rows; });
  }
  for (int64_t inputs : {1, 8, 15, 16, 17, 31, 33, 100, 768}) {
    add("inputs_" + std::to_string(inputs), [=](Case& c) { c.inputs = inputs; });
  }
  for (int64_t outputs : {1, 2, 3, 7, 8, 9, 15, 67}) {
    add("outputs_" + std::to_string(outputs), [=](Case& c) { c.outputs = outputs; });
    add("one_row_outputs_" + std::to_string(outputs), [=](Case& c) { c.outputs = outputs, c.rows = 1; });
    add("many_rows_outputs_" + std::to_string(outputs), [=](Case& c) { c.outputs = outputs, c.rows = 20; });
  }
  for (const Storage& storage : Storages()) {
    const std::string& name = storage.name;
    for (int64_t rows : {1, 5, 17}) {
      const std::string suffix = "_rows_" + std::to_string(rows);
      add(name + suffix, [=](Case& c) { c.storage = storage, c.rows = rows, c.inputs = 192; });
      // Shorter than a group, a group and a bit, one that ends in the middle of its second half.
      for (int64_t inputs : {1, 27, 33, 64, 85, 127}) {
        add(name + suffix + "_inputs_" + std::to_string(inputs),
            [=](Case& c) { c.storage = storage, c.rows = rows, c.inputs = inputs; });
      }
    }
  }
  for (const Storage& storage : BlockStorages()) {
    for (int64_t rows : {1, 5, 17}) {
      for (int64_t inputs : {256, 768}) {
        add(storage.name + "_rows_" + std::to_string(rows) + "_inputs_" + std::to_string(inputs),
            [=](Case& c) { c.storage = storage, c.rows = rows, c.inputs = inputs; });
      }
    }
  }
  add("sigmoid", [](Case& c) { c.activation = Activation::kSigmoid; });
  add("tanh", [](Case& c) { c.activation = Activation::kTanh; });
  add("squared_relu", [](Case& c) { c.activation = Activation::kSquaredRelu; });
  add("squared_relu_many_rows", [](Case& c) { c.activation = Activation::kSquaredRelu, c.rows = 19; });
  add("silu", [](Case& c) { c.activation = Activation::kSilu; });
  add("decay", [](Case& c) { c.activation = Activation::kDecay; });
  add("decay_biased_many_rows", [](Case& c) { c.activation = Activation::kDecay, c.bias = true, c.rows = 19; });
  for (int64_t rows : {1, 5, 19}) {
    const std::string suffix = "_rows_" + std::to_string(rows);
    add("bias" + suffix, [=](Case& c) { c.bias = true, c.rows = rows; });
    add("gate" + suffix, [=](Case& c) { c.gate = true, c.rows = rows; });
    add("gate_in_place" + suffix, [=](Case& c) { c.gate = c.in_place = c.bias = true, c.rows = rows; });
    add("gate_accumulate" + suffix, [=](Case& c) { c.gate = c.accumulate = true, c.rows = rows; });
    add("bias_outputs_67" + suffix, [=](Case& c) { c.bias = true, c.outputs = 67, c.rows = rows; });
  }
  add("accumulate", [](Case& c) { c.accumulate = true; });
  add("accumulate_one_row", [](Case& c) { c.accumulate = true, c.rows = 1; });
  add("accumulate_many_rows", [](Case& c) { c.accumulate = true, c.rows = 19; });
  add("accumulate_tanh", [](Case& c) { c.accumulate = true, c.activation = Activation::kTanh; });
  // More outputs than the panel of widened weights holds, and not a whole number of panels.
  add("several_panels", [](Case& c) { c.inputs = 3000, c.outputs = 45, c.rows = 8; });
  // One tile of outputs is more than the panel.
  add("inputs_beyond_panel", [](Case& c) { c.inputs = 17000, c.outputs = 5, c.rows = 7; });
  return cases;
}

struct Problem {
  StoredMatrix weight;
  std::vector<float> x;
  std::vector<float> bias;
  std::vector<float> gate;
  std::vector<float> y;  // what accumulate adds to
};

Problem MakeProblem(const Case& c) {
  Random random(7);
  Problem p;
  p.weight = StoredMatrix(c.storage, c.outputs, c.inputs, random.Uniforms(c.outputs * c.inputs, -1.0f, 1.0f));
  p.x = random.Uniforms(c.rows * c.inputs, -2.0f, 2.0f);
  p.y = random.Uniforms(c.rows * c.outputs, -3.0f, 3.0f);
  p.bias = c.bias ? random.Uniforms(c.outputs, -3.0f, 3.0f) : std::vector<float>(static_cast<size_t>(c.outputs));
  p.gate = c.gate ? random.Uniforms(c.rows * c.outputs, -2.0f, 2.0f) : std::vector<float>(p.y.size(), 1.0f);
  return p;
}

// Rows [begin, begin + count) of the problem alone.
std::vector<float> Compute(MatmulOp* matmul, const Case& c, const Problem& p, int64_t begin, int64_t count) {
  const std::vector<float> x(p.x.begin() + begin * c.inputs, p.x.begin() + (begin + count) * c.inputs);
  const std::vector<float> gate(p.gate.begin() + begin * c.outputs, p.gate.begin() + (begin + count) * c.outputs);
  std::vector<float> y(p.y.begin() + begin * c.outputs, p.y.begin() + (begin + count) * c.outputs);
  if (c.in_place) y = gate;
  MatmulArgs args;
  args.rows = count;
  args.weight = p.weight.view();
  args.x = x.data();
  if (c.bias) args.bias = p.bias.data();
  args.activation = c.activation;
  if (c.gate) args.gate = c.in_place ? y.data() : gate.data();
  args.accumulate = c.accumulate;
  args.y = y.data();
  HostStream stream;
  EXPECT_OK(matmul(args, stream));
  EXPECT_OK(stream.Synchronize());
  return y;
}

// A sum of n products loses at most about n roundings of sum |x w|; here one side adds in order, the other in 16 lanes.
std::vector<double> Tolerance(const Case& c, const Problem& p) {
  std::vector<double> tolerance;
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t o = 0; o < c.outputs; ++o) {
      double sum = p.bias[o];
      double magnitude = std::abs(sum);
      for (int64_t k = 0; k < c.inputs; ++k) {
        const double product = static_cast<double>(p.x[row * c.inputs + k]) * p.weight.widened[o * c.inputs + k];
        sum += product;
        magnitude += std::abs(product);
      }
      double bound = static_cast<double>(c.inputs + c.inputs / 16 + 9) * kUnitRoundoff * magnitude;
      double value = sum;
      switch (c.activation) {
        case Activation::kNone:
          break;
        case Activation::kSigmoid:
          value = 1.0;
          bound = bound / 4 + 2 * kFunctionUlps * kUnitRoundoff * 2;
          break;
        case Activation::kTanh:
          value = 1.0;
          bound = bound + 2 * kFunctionUlps * kUnitRoundoff * 2;
          break;
        case Activation::kSquaredRelu:
          value = sum * sum;
          bound = (2 * std::abs(sum) + bound) * bound + 2 * kUnitRoundoff * value;
          break;
        case Activation::kSilu:  // z sigmoid(z); its slope is below 1.1
          value = sum;
          bound = 1.1 * bound + 2 * (kFunctionUlps + 1) * kUnitRoundoff * 2 * std::abs(value);
          break;
        case Activation::kDecay: {  // e exp(-e) <= 1 / e bounds its slope; e = exp(z) is itself off by a few units
          value = 1.0;
          const double function_error = 2 * kFunctionUlps * kUnitRoundoff * 2;
          bound = (bound + function_error) / 2 + function_error;
          break;
        }
      }
      const double gate = std::abs(p.gate[row * c.outputs + o]);
      if (c.gate) bound = gate * (bound + 2 * kUnitRoundoff * std::abs(value));
      value *= gate;
      if (c.accumulate) bound += 2 * kUnitRoundoff * (std::abs(value) + std::abs(p.y[row * c.outputs + o]));
      tolerance.push_back(bound);
    }
  }
  return tolerance;
}

class MatmulTest : public ::testing::TestWithParam<std::tuple<const OpTable*, Case>> {};

TEST_P(MatmulTest, EqualsReference) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  const std::vector<float> expected = Compute(reference::Matmul, c, p, 0, c.rows);
  EXPECT_TRUE(AllClose(expected, Compute(table->matmul, c, p, 0, c.rows), Tolerance(c, p)));
}

TEST_P(MatmulTest, RowAloneHasTheBitsOfRowInBatch) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  const std::vector<float> whole = Compute(table->matmul, c, p, 0, c.rows);
  std::vector<float> rows;
  for (int64_t row = 0; row < c.rows; ++row) {
    const std::vector<float> one = Compute(table->matmul, c, p, row, 1);
    rows.insert(rows.end(), one.begin(), one.end());
  }
  EXPECT_TRUE(SameBits(whole, rows));
}

TEST_P(MatmulTest, AnySplitOfTheRowsHasTheBitsOfTheWhole) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  const std::vector<float> whole = Compute(table->matmul, c, p, 0, c.rows);
  for (int64_t split = 1; split < c.rows; ++split) {
    std::vector<float> parts = Compute(table->matmul, c, p, 0, split);
    const std::vector<float> rest = Compute(table->matmul, c, p, split, c.rows - split);
    parts.insert(parts.end(), rest.begin(), rest.end());
    EXPECT_TRUE(SameBits(whole, parts)) << "split at " << split;
  }
}

// Whatever way the weights are stored, the product is that of the floats they stand for.
TEST_P(MatmulTest, StoredWeightsGiveTheBitsOfTheirFloats) {
  const auto& [table, c] = GetParam();
  Problem p = MakeProblem(c);
  const std::vector<float> stored = Compute(table->matmul, c, p, 0, c.rows);
  p.weight = StoredMatrix(Storages()[0], c.outputs, c.inputs, p.weight.widened);
  EXPECT_TRUE(SameBits(Compute(table->matmul, c, p, 0, c.rows), stored));
}

TEST_P(MatmulTest, TablesOfOneFamilyGiveTheSameBits) {
  const auto& [table, c] = GetParam();
  const Problem p = MakeProblem(c);
  const std::vector<float> mine = Compute(table->matmul, c, p, 0, c.rows);
  for (const OpTable* other : Backends()) {
    if (other->numeric_family != table->numeric_family) continue;
    EXPECT_TRUE(SameBits(mine, Compute(other->matmul, c, p, 0, c.rows))) << other->name;
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, MatmulTest,
                         ::testing::Combine(::testing::ValuesIn(Backends()), ::testing::ValuesIn(Cases())),
                         [](const auto& info) {
                           return TestName(std::get<0>(info.param)) + "_" + std::get<1>(info.param).name;
                         });

class MatmulSpecialTest : public ::testing::TestWithParam<const OpTable*> {};

// All 65536 values of each 16-bit type, times one: the widening is exact, subnormals, infinities and NaN too.
TEST_P(MatmulSpecialTest, WidensEveryWeightExactly) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    std::vector<uint16_t> weight(1 << 16);
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<uint16_t>(i);
    std::vector<float> expected(weight.size());
    WidenToFloat(dtype, weight.data(), static_cast<int64_t>(weight.size()), expected.data());
    for (int64_t rows : {1, 3, 9}) {
      const std::vector<float> x(static_cast<size_t>(rows), 1.0f);
      std::vector<float> y(weight.size() * static_cast<size_t>(rows));
      MatmulArgs args;
      args.rows = rows;
      args.weight = {dtype, static_cast<int64_t>(weight.size()), 1, weight.data()};
      args.x = x.data();
      args.y = y.data();
      HostStream stream;
      ASSERT_OK(GetParam()->matmul(args, stream));
      size_t wrong = 0;
      for (size_t i = 0; i < y.size(); ++i) {
        const float want = expected[i % expected.size()];
        if (!(y[i] == want || (std::isnan(y[i]) && std::isnan(want)))) ++wrong;
      }
      EXPECT_EQ(wrong, 0u) << Name(dtype) << ", " << rows << " rows";
    }
  }
}

TEST_P(MatmulSpecialTest, NotANumberStaysInItsRow) {
  for (Activation activation : {Activation::kNone, Activation::kSigmoid, Activation::kTanh, Activation::kSquaredRelu,
                                Activation::kSilu, Activation::kDecay}) {
    const int64_t rows = 9;
    const int64_t inputs = 20;
    const int64_t outputs = 6;
    const std::vector<float> weight(static_cast<size_t>(outputs * inputs), 0.5f);
    std::vector<float> x(static_cast<size_t>(rows * inputs), 0.25f);
    x[4 * inputs + 19] = NAN;
    std::vector<float> y(static_cast<size_t>(rows * outputs));
    MatmulArgs args;
    args.rows = rows;
    args.weight = {DType::kFloat32, outputs, inputs, weight.data()};
    args.x = x.data();
    args.activation = activation;
    args.y = y.data();
    HostStream stream;
    ASSERT_OK(GetParam()->matmul(args, stream));
    for (int64_t i = 0; i < rows * outputs; ++i) {
      EXPECT_EQ(std::isnan(y[i]), i / outputs == 4)
          << "activation " << static_cast<int>(activation) << ", y[" << i << "]";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, MatmulSpecialTest, ::testing::ValuesIn(Backends()),
                         [](const auto& info) { return TestName(info.param); });

}  // namespace
}  // namespace rwkv::kernels::conformance
