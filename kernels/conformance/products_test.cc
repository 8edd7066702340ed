// Products of every backend: each product against its formula, several in one call, and law N1.
#include "kernels/api/products.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "kernels/base/fixed_point.h"
#include "kernels/base/status_macros.h"
#include "kernels/conformance/bounded.h"
#include "kernels/conformance/conformance.h"
#include "kernels/conformance/device_memory.h"
#include "kernels/conformance/op_suite.h"
#include "kernels/cpu/emulated_amx.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/dispatch/open_device.h"
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
  bool bf16_inputs = false;  // Inputs that are numbers of bf16.
  float zeros = 0.0f;  // So many of the inputs are zero, of each group or of all but a few; the weight is for such.
};

// The nearest of bf16, ties to even.
float RoundToBFloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

Floats RoundToBFloat16(Floats x) {
  for (float& value : x) value = RoundToBFloat16(value);
  return x;
}

enum Input { kX, kGate, kStart };  // The last is what accumulate adds to.

Bounded Activate(Activation activation, const Bounded& z) {
  switch (activation) {
    case Activation::kNone:
      return z;
    case Activation::kSigmoid:
      return Sigmoid(z);
    case Activation::kTanh:
      return Tanh(z);
    case Activation::kSquaredRelu: {
      const Bounded positive = Max(z, Bounded(0.0));
      return positive * positive;
    }
    case Activation::kSilu:
      return z * Sigmoid(z);
    case Activation::kDecay:
      return Exp(-Exp(z));
  }
  return z;
}

OpCase Make(const Case& c) {
  Random random(7);
  const StoredMatrix weight(c.storage, c.outputs, c.inputs, random.Uniforms(c.outputs * c.inputs, -1.0f, 1.0f));
  const Floats bias = random.Uniforms(c.outputs, -3.0f, 3.0f);
  OpCase op;
  op.y_width = c.outputs;
  op.packing = {{0}, 1, 0};
  Floats x = random.Uniforms(c.rows * c.inputs, -2.0f, 2.0f);
  if (c.bf16_inputs) x = RoundToBFloat16(std::move(x));
  if (c.zeros > 0.0f) {
    const Floats draws = random.Uniforms(c.rows * c.inputs, 0.0f, 1.0f);
    for (int64_t i = 0; i < c.rows * c.inputs; ++i) x[i] = draws[i] < c.zeros ? 0.0f : x[i];
  }
  op.sequences.push_back({c.rows,
                          {std::move(x), random.Uniforms(c.rows * c.outputs, -2.0f, 2.0f),
                           random.Uniforms(c.rows * c.outputs, -3.0f, 3.0f)},
                          {},
                          {}});
  op.run = [=](DeviceMemory& memory, const OpCall& call) {
    const int64_t y_bytes = call.step.rows * c.outputs * 4;
    RWKV_RETURN_IF_ERROR(memory.stream().Copy(call.y, call.inputs[kStart], y_bytes));
    Product product;
    product.weight = memory.Load(weight.view(), c.zeros > 0.0f ? WeightUse::kSparseProduct : WeightUse::kProduct);
    product.x = call.inputs[kX];
    if (c.bias) product.bias = memory.Put(bias);
    product.activation = c.activation;
    if (c.gate) product.gate = call.inputs[kGate];
    product.accumulate = c.accumulate;
    product.y = c.in_place ? call.inputs[kGate] : call.y;
    RWKV_RETURN_IF_ERROR(memory.device().ops().products({call.step.rows, &product, 1}, memory.stream()));
    return memory.stream().Copy(call.y, product.y, c.in_place ? y_bytes : 0);
  };
  op.formula = [=](const Sequence& row) {
    RowResult result;
    const Bounds x = ProductInputs(weight.view(), row.inputs[kX].data());
    for (int64_t o = 0; o < c.outputs; ++o) {
      Bounded z = Dot(x.data(), weight.widened.data() + o * c.inputs, c.inputs);
      if (c.bias) z = z + Bounded(bias[o]);
      z = Activate(c.activation, z);
      if (c.gate) z = z * Bounded(row.inputs[kGate][o]);
      result.y.push_back(c.accumulate ? Bounded(row.inputs[kStart][o]) + z : z);
    }
    return result;
  };
  return op;
}

std::vector<std::shared_ptr<const OpCase>> Cases() {
  Table<Case> table;
  table.Add("base", [](Case&) {});
  for (int64_t rows : {1, 2, 3, 4, 6, 7, 8, 13, 33}) {
    table.Add("rows_" + std::to_string(rows), [=](Case& c) { c.rows = rows; });
  }
  for (int64_t inputs : {1, 8, 15, 16, 17, 31, 33, 100, 768}) {
    table.Add("inputs_" + std::to_string(inputs), [=](Case& c) { c.inputs = inputs; });
  }
  for (int64_t outputs : {1, 2, 3, 7, 8, 9, 15, 67}) {
    table.Add("outputs_" + std::to_string(outputs), [=](Case& c) { c.outputs = outputs; });
    table.Add("one_row_outputs_" + std::to_string(outputs), [=](Case& c) { c.outputs = outputs, c.rows = 1; });
    table.Add("many_rows_outputs_" + std::to_string(outputs), [=](Case& c) { c.outputs = outputs, c.rows = 20; });
  }
  for (const Storage& storage : Storages()) {
    const std::string& name = storage.name;
    for (int64_t rows : {1, 5, 17}) {
      const std::string suffix = "_rows_" + std::to_string(rows);
      table.Add(name + suffix, [=](Case& c) { c.storage = storage, c.rows = rows, c.inputs = 192; });
      // Shorter than a group, a group and a bit, one that ends in the middle of its second half.
      for (int64_t inputs : {1, 27, 33, 64, 85, 127}) {
        table.Add(name + suffix + "_inputs_" + std::to_string(inputs),
                  [=](Case& c) { c.storage = storage, c.rows = rows, c.inputs = inputs; });
      }
    }
  }
  for (const Storage& storage : Storages()) {
    for (int64_t rows : {1, 3, 6, 17, 34}) {
      const std::string name = absl::StrCat(storage.name, "_sparse_rows_", rows);
      const auto add = [&](absl::string_view suffix, float zeros, int64_t inputs, int64_t outputs) {
        table.Add(absl::StrCat(name, suffix), [=](Case& c) {
          c.storage = storage, c.rows = rows, c.inputs = inputs, c.outputs = outputs, c.zeros = zeros;
          c.bias = c.accumulate = outputs % 2 == 1;
        });
      };
      add("", 0.85f, 200, 131);
      if (storage.quantization != Quantization::kInt8) continue;  // Others need not lie otherwise for it.
      add("_dense", 0.01f, 320, 16);
      add("_nearly_all", 0.995f, 320, 47);
      add("_inputs_33", 0.5f, 33, 300);
      add("_inputs_1", 0.5f, 1, 129);
    }
  }
  for (const Storage& storage : BlockStorages()) {
    for (int64_t rows : {1, 5, 17}) {
      for (int64_t inputs : {256, 768}) {
        table.Add(storage.name + "_rows_" + std::to_string(rows) + "_inputs_" + std::to_string(inputs),
                  [=](Case& c) { c.storage = storage, c.rows = rows, c.inputs = inputs; });
      }
    }
  }
  table.Add("sigmoid", [](Case& c) { c.activation = Activation::kSigmoid; });
  table.Add("tanh", [](Case& c) { c.activation = Activation::kTanh; });
  table.Add("squared_relu", [](Case& c) { c.activation = Activation::kSquaredRelu; });
  table.Add("squared_relu_many_rows", [](Case& c) { c.activation = Activation::kSquaredRelu, c.rows = 19; });
  table.Add("silu", [](Case& c) { c.activation = Activation::kSilu; });
  table.Add("decay", [](Case& c) { c.activation = Activation::kDecay; });
  table.Add("decay_biased_many_rows", [](Case& c) { c.activation = Activation::kDecay, c.bias = true, c.rows = 19; });
  for (int64_t rows : {1, 5, 19}) {
    const std::string suffix = "_rows_" + std::to_string(rows);
    table.Add("bias" + suffix, [=](Case& c) { c.bias = true, c.rows = rows; });
    table.Add("gate" + suffix, [=](Case& c) { c.gate = true, c.rows = rows; });
    table.Add("gate_in_place" + suffix, [=](Case& c) { c.gate = c.in_place = c.bias = true, c.rows = rows; });
    table.Add("gate_accumulate" + suffix, [=](Case& c) { c.gate = c.accumulate = true, c.rows = rows; });
    table.Add("bias_outputs_67" + suffix, [=](Case& c) { c.bias = true, c.outputs = 67, c.rows = rows; });
  }
  table.Add("accumulate", [](Case& c) { c.accumulate = true; });
  table.Add("accumulate_one_row", [](Case& c) { c.accumulate = true, c.rows = 1; });
  table.Add("accumulate_many_rows", [](Case& c) { c.accumulate = true, c.rows = 19; });
  table.Add("accumulate_tanh", [](Case& c) { c.accumulate = true, c.activation = Activation::kTanh; });
  // More outputs than the panel of widened weights holds, and not a whole number of panels.
  table.Add("several_panels", [](Case& c) { c.inputs = 3000, c.outputs = 45, c.rows = 8; });
  // For tiles of 16 outputs and 16 rows: full and broken, few and many rows, steps of a panel's inputs, several panels.
  for (int64_t rows : {16, 17, 32, 34, 49}) {
    table.Add("tiles_rows_" + std::to_string(rows),
              [=](Case& c) { c.rows = rows, c.inputs = 1100, c.outputs = 300, c.bias = true; });
  }
  table.Add("tiles_many_rows", [](Case& c) { c.rows = 530, c.inputs = 70, c.outputs = 20; });
  // A tile's outputs far apart, whose sums are stored as runs: several parts, the last one short, and outputs that are
  // left over. More rows as tiles than the cache is to hold. int8 with minimums, which no tile has.
  for (const Storage& storage : Storages()) {
    if (storage.dtype != DType::kBFloat16 && storage.group != 64) continue;
    for (int64_t rows : {8, 17}) {
      table.Add(absl::StrCat(storage.name, "_far_outputs_rows_", rows), [=](Case& c) {
        c.storage = storage, c.rows = rows, c.inputs = 70, c.outputs = 2101, c.bias = c.accumulate = c.gate = true;
      });
    }
    if (storage.quantization != Quantization::kInt8) continue;
    table.Add("rows_beyond_cache",
              [=](Case& c) { c.storage = storage, c.rows = 100, c.inputs = 5000, c.outputs = 18; });
    table.Add("int8_group_64_minimums",
              [=](Case& c) { c.storage = storage, c.storage.has_minimums = true, c.rows = 6, c.inputs = 192; });
  }
  // Sums that wait in memory for the next block of inputs, of a few tens of rows and of more.
  for (int64_t rows : {20, 70}) {
    table.Add(absl::StrCat("blocks_of_inputs_rows_", rows),
              [=](Case& c) { c.rows = rows, c.inputs = 1700, c.outputs = 75, c.gate = c.accumulate = true; });
  }
  // One tile of outputs is more than the panel.
  table.Add("inputs_beyond_panel", [](Case& c) { c.inputs = 17000, c.outputs = 5, c.rows = 7; });
  return table.Build(Make);
}

RWKV_TEST_OPERATION(Products, Cases());

// Of devices that round their inputs to bf16: those that need no rounding give the formula.
std::vector<std::string> RoundingBackends() {
  if (!cpu::HasEmulatedAmx()) return {};
  std::vector<std::string> backends = {std::string(cpu::kEmulatedAmxBf16Device)};
  for (const char* const name : {"cpu/avx512/bf16", "cpu/amx/bf16"}) {
    if (OpenDevice(name).ok()) backends.emplace_back(name);
  }
  return backends;
}

std::vector<std::shared_ptr<const OpCase>> RoundedCases() {
  Table<Case> table;
  for (int64_t rows : {1, 8, 17, 33, 70}) {
    for (int64_t inputs : {1, 31, 33, 768}) {
      for (int64_t outputs : {1, 150, 300}) {
        table.Add(absl::StrCat("rows_", rows, "_inputs_", inputs, "_outputs_", outputs), [=](Case& c) {
          c.rows = rows, c.inputs = inputs, c.outputs = outputs, c.bf16_inputs = true;
          c.bias = rows % 2 == 1, c.accumulate = outputs == 150;
        });
      }
    }
  }
  return table.Build(Make);
}

INSTANTIATE_TEST_SUITE_P(RoundingProducts, OpTest,
                         ::testing::Combine(::testing::ValuesIn(RoundingBackends()),
                                            ::testing::ValuesIn(RoundedCases())),
                         OpTestName);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(OpTest);

class ProductsTest : public ::testing::TestWithParam<std::string> {
 public:
  static Floats Multiply(DeviceMemory& memory, const Weight* weight, int64_t rows, const Floats& x,
                         Activation activation = Activation::kNone) {
    Product product;
    product.weight = weight;
    product.x = memory.Put(x);
    product.activation = activation;
    product.y = memory.Zeros(rows * weight->matrix.rows);
    EXPECT_OK(memory.device().ops().products({rows, &product, 1}, memory.stream()));
    return memory.Get(product.y, rows * weight->matrix.rows);
  }

 protected:
  ProductsTest() : memory_(OpenedDevice(GetParam())) {}

  Floats Multiply(const Weight* weight, int64_t rows, const Floats& x, Activation activation = Activation::kNone) {
    return Multiply(memory_, weight, rows, x, activation);
  }

  DeviceMemory memory_;
};

// All 65536 values of each 16-bit type, infinities and NaN too, times one and times what makes subnormals normal: the
// widening is exact. A subnormal result may be zero. On AMX, whose bf16 has no subnormal numbers and adds parts of an
// input, such weights are zero and infinite ones give NaN; so may they on tensor cores, which add parts too.
TEST_P(ProductsTest, WidensEveryWeightExactly) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const absl::string_view family = memory_.device().numeric_family();
    const bool has_parts =
        absl::StartsWith(family, "cuda") || (dtype == DType::kBFloat16 && absl::StartsWith(family, "cpu/amx"));
    std::vector<uint16_t> weight(1 << 16);
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<uint16_t>(i);
    std::vector<float> expected(weight.size());
    WidenToFloat(dtype, weight.data(), static_cast<int64_t>(weight.size()), expected.data());
    const Weight* const loaded = memory_.Load({dtype, static_cast<int64_t>(weight.size()), 1, weight.data()});
    for (int64_t rows : {1, 3, 9}) {
      // A warp an output: seconds for what one row has shown.
      if (rows > 1 && cuda::IsEmulatedDevice(GetParam())) continue;
      for (float factor : {1.0f, 0x1p30f}) {
        const Floats y = Multiply(loaded, rows, Floats(static_cast<size_t>(rows), factor));
        size_t wrong = 0;
        for (size_t i = 0; i < y.size(); ++i) {
          const float want = expected[i % expected.size()] * factor;
          const float smallest = has_parts ? expected[i % expected.size()] : want;
          const bool gone = y[i] == 0.0f && std::fpclassify(smallest) == FP_SUBNORMAL;
          const bool not_a_number = std::isnan(want) || (has_parts && std::isinf(want));
          if (!(y[i] == want || gone || (std::isnan(y[i]) && not_a_number))) ++wrong;
        }
        EXPECT_EQ(wrong, 0u) << Name(dtype) << ", " << rows << " rows, times " << factor;
      }
    }
  }
}

// What such a device makes of any inputs is what it makes of the nearest numbers of bf16, and only where weights are
// such numbers: other weights are multiplied as everywhere.
TEST(RoundingProductsTest, InputsBecomeTheNearestBf16) {
  Random random(19);
  for (const std::string& backend : RoundingBackends()) {
    for (const int64_t rows : {1, 20, 40}) {
      for (const Storage& storage : Storages()) {
        const bool rounds = storage.quantization == Quantization::kNone && storage.dtype == DType::kBFloat16;
        const int64_t inputs = 100, outputs = 50;
        const StoredMatrix weight(storage, outputs, inputs, random.Uniforms(outputs * inputs, -1.0f, 1.0f));
        const Floats x = random.Uniforms(rows * inputs, -2.0f, 2.0f);
        const auto multiply = [&](const std::string& device, const Floats& of) {
          DeviceMemory memory(OpenedDevice(device));
          return ProductsTest::Multiply(memory, memory.Load(weight.view()), rows, of);
        };
        const Floats y = multiply(backend, x);
        EXPECT_TRUE(SameBits(y, multiply(rounds ? backend : "cpu/avx512vnni", rounds ? RoundToBFloat16(x) : x)))
            << storage.name << ", " << rows << " rows";
        EXPECT_EQ(SameBits(y, multiply(std::string(cpu::kEmulatedAmxDevice), x)), !rounds)
            << storage.name << ", " << rows << " rows";
      }
    }
  }
}

// Sums of whole numbers have one result on every device: the plain twin's.
TEST_P(ProductsTest, ProductsInFixedPointAreTheReferencesBits) {
  std::vector<Storage> storages = Storages();
  for (const Storage& blocks : BlockStorages()) storages.push_back(blocks);
  DeviceMemory reference(OpenedDevice("reference"));
  Random random(11);
  int tried = 0;
  for (const Storage& storage : storages) {
    // The last one is more than a kernel's blocks take at a time.
    for (const int64_t inputs : {64, 85, 127, 256, 1100}) {
      if (storage.quantization == Quantization::kBlocks && inputs != 256) continue;
      for (const int64_t outputs : {1, 33, 150}) {
        if (inputs == 1100 && outputs != 33) continue;
        const StoredMatrix weight(storage, outputs, inputs, random.Uniforms(outputs * inputs, -1.0f, 1.0f));
        if (FixedPointGroup(weight.view()) == 0) continue;
        ++tried;
        Floats x = random.Uniforms(20 * inputs, -2.0f, 2.0f);
        std::fill_n(x.begin(), 40, 0.0f);
        for (size_t i = 0; i < x.size(); i += 1 + i % 5) x[i] = 0.0f;
        const Floats expected = Multiply(reference, reference.Load(weight.view()), 20, x);
        for (const int64_t rows : {1, 2, 3, 4, 5, 8, 9, 13, 20}) {
          const Floats of_rows(x.begin(), x.begin() + rows * inputs);
          for (const WeightUse use : {WeightUse::kProduct, WeightUse::kSparseProduct}) {
            EXPECT_TRUE(SameBits(absl::MakeConstSpan(expected).first(static_cast<size_t>(rows * outputs)),
                                 Multiply(memory_.Load(weight.view(), use), rows, of_rows)))
                << storage.name << ", " << inputs << " inputs, " << outputs << " outputs, " << rows << " rows, use "
                << static_cast<int>(use);
          }
        }
      }
    }
  }
  EXPECT_EQ(tried, 5 * (4 * 3 + 1) + 2 * 3);
}

// Groups of inputs that are hardly numbers: none, too small to count, just large enough, the largest; and in a row of
// their own each, infinite and none. Codes and scales are those of any matrix.
TEST_P(ProductsTest, InputsAtTheLimitsOfFixedPointAreTheReferences) {
  DeviceMemory reference(OpenedDevice("reference"));
  Random random(29);
  for (const Storage& storage : Storages()) {
    const int64_t inputs = 160, outputs = 35;
    const StoredMatrix weight(storage, outputs, inputs, random.Uniforms(outputs * inputs, -1.0f, 1.0f));
    if (FixedPointGroup(weight.view()) == 0) continue;
    const float sizes[] = {0.0f, 0x0.fffffep-100f, 0x1p-100f, 3.4028234e38f, INFINITY, -INFINITY, NAN};
    const int64_t all = 3 * std::size(sizes);
    Floats x = random.Uniforms(all * inputs, -2.0f, 2.0f);
    for (int64_t row = 0; row < all; ++row) {
      // The whole second group of 64, one number of it, or one number of the row: beside none the smallest counts.
      for (int64_t k = 64; k < 128; ++k) {
        if (row % 3 == 0) x[row * inputs + k] = k % 3 == 0 ? -sizes[row / 3] : sizes[row / 3];
      }
      if (row % 3 == 2) std::fill_n(x.begin() + row * inputs, inputs, 0.0f);
      if (row % 3 > 0) x[row * inputs + 64 + 3 * row] = sizes[row / 3];
    }
    const Floats expected = Multiply(reference, reference.Load(weight.view()), all, x);
    for (const int64_t rows : {1, 3, 10, 21}) {
      for (int64_t begin = 0; begin + rows <= all; begin += rows) {
        const Floats of_rows(x.begin() + begin * inputs, x.begin() + (begin + rows) * inputs);
        const Floats y = Multiply(memory_.Load(weight.view()), rows, of_rows);
        for (int64_t i = 0; i < rows * outputs; ++i) {
          const float want = expected[begin * outputs + i];
          ASSERT_TRUE(std::isnan(want) ? std::isnan(y[i]) : SameBits({&want, 1}, {&y[i], 1}))
              << storage.name << ", row " << i / outputs << " of " << rows << " from " << begin << ", output "
              << i % outputs << ": " << y[i] << ", not " << want;
        }
      }
    }
  }
}

// So does a NaN whose upper half is that of an infinity, and an infinite number; that one stays what it is where weights
// and parts of inputs are single numbers.
TEST_P(ProductsTest, NotANumberStaysInItsRow) {
  const int64_t rows = 9;
  const int64_t inputs = 20;
  const int64_t outputs = 6;
  float hidden_nan;
  const uint32_t bits = 0x7f800001u;
  std::memcpy(&hidden_nan, &bits, sizeof(bits));
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const StoredMatrix weight({"", dtype}, outputs, inputs, Floats(static_cast<size_t>(outputs * inputs), 0.5f));
    const Weight* const loaded = memory_.Load(weight.view());
    for (Activation activation : {Activation::kNone, Activation::kSigmoid, Activation::kTanh, Activation::kSquaredRelu,
                                  Activation::kSilu, Activation::kDecay}) {
      for (const float value : {NAN, hidden_nan}) {
        Floats x(static_cast<size_t>(rows * inputs), 0.25f);
        x[4 * inputs + 19] = value;
        const Floats y = Multiply(loaded, rows, x, activation);
        for (int64_t i = 0; i < rows * outputs; ++i) {
          EXPECT_EQ(std::isnan(y[i]), i / outputs == 4)
              << Name(dtype) << ", activation " << static_cast<int>(activation) << ", y[" << i << "]";
        }
      }
    }
    Floats x(static_cast<size_t>(rows * inputs), 0.25f);
    x[4 * inputs + 19] = INFINITY;
    const Floats y = Multiply(loaded, rows, x);
    const bool stays = absl::StartsWith(GetParam(), "cuda") && dtype == DType::kBFloat16;
    for (int64_t i = 0; i < rows * outputs; ++i) {
      EXPECT_EQ(std::isfinite(y[i]), i / outputs != 4) << Name(dtype) << ", y[" << i << "]";
      if (stays && i / outputs == 4) EXPECT_EQ(y[i], INFINITY) << Name(dtype) << ", y[" << i << "]";
    }
  }
}

// Seven products of one call, of all shapes and epilogues, have the bits of seven calls.
TEST_P(ProductsTest, TogetherTheyHaveTheBitsOfEachAlone) {
  Random random(3);
  for (int64_t rows : {1, 2, 9, 40}) {
    const Floats x = random.Uniforms(rows * 96, -2.0f, 2.0f);
    const float* const inputs = memory_.Put(x);
    std::deque<StoredMatrix> stored;  // What the device has loaded stays where it is.
    std::vector<Product> products;
    const int64_t outputs[] = {1, 96, 5, 33, 200, 16, 7};
    for (int i = 0; i < 7; ++i) {
      const Storage storage = Storages()[i];
      stored.emplace_back(storage, outputs[i], 96, random.Uniforms(outputs[i] * 96, -1.0f, 1.0f));
      Product product;
      product.weight = memory_.Load(stored.back().view());
      product.x = inputs;
      if (i % 2 == 1) product.bias = memory_.Put(random.Uniforms(outputs[i], -1.0f, 1.0f));
      if (i % 3 == 1) product.gate = memory_.Put(random.Uniforms(rows * outputs[i], -1.0f, 1.0f));
      product.activation = static_cast<Activation>(i % 6);
      product.accumulate = i == 4;
      product.y = memory_.Zeros(rows * outputs[i]);
      products.push_back(product);
    }
    ASSERT_OK(memory_.device().ops().products({rows, products.data(), 7}, memory_.stream()));
    for (int i = 0; i < 7; ++i) {
      const Floats together = memory_.Get(products[i].y, rows * outputs[i]);
      products[i].y = memory_.Zeros(rows * outputs[i]);
      ASSERT_OK(memory_.device().ops().products({rows, &products[i], 1}, memory_.stream()));
      EXPECT_TRUE(SameBits(memory_.Get(products[i].y, rows * outputs[i]), together)) << rows << " rows, product " << i;
    }
  }
}

// The same of products whose weights are stored alike, which a device may take together; more than it may take at once.
TEST_P(ProductsTest, ManyOfOneKindHaveTheBitsOfEachAlone) {
  Random random(31);
  for (const Storage& storage : Storages()) {
    if (storage.group == 64 || storage.name == "int8_minimums") continue;
    const int64_t cols = 96;
    for (const int64_t rows : {1, 9, 33}) {
      const float* const x = memory_.Put(random.Uniforms(rows * cols, -2.0f, 2.0f));
      std::deque<StoredMatrix> stored;
      std::vector<Product> products;
      for (const int64_t outputs : {1, 17, 5, 70, 16, 3, 33, 8, 40}) {
        stored.emplace_back(storage, outputs, cols, random.Uniforms(outputs * cols, -1.0f, 1.0f));
        Product product;
        product.weight = memory_.Load(stored.back().view());
        product.x = x;
        product.y = memory_.Unwritten(rows * outputs);
        products.push_back(product);
      }
      const auto count = static_cast<int64_t>(products.size());
      ASSERT_OK(memory_.device().ops().products({rows, products.data(), count}, memory_.stream()));
      for (int64_t i = 0; i < count; ++i) {
        const int64_t size = rows * products[i].weight->matrix.rows;
        const Floats together = memory_.Get(products[i].y, size);
        products[i].y = memory_.Unwritten(size);
        ASSERT_OK(memory_.device().ops().products({rows, &products[i], 1}, memory_.stream()));
        EXPECT_TRUE(SameBits(memory_.Get(products[i].y, size), together))
            << storage.name << ", " << rows << " rows, product " << i;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, ProductsTest, ::testing::ValuesIn(Backends()),
                         [](const auto& info) { return TestName(info.param); });

}  // namespace
}  // namespace rwkv::kernels::conformance
