// Laws of products on every backend: exact weights, sums of whole numbers bit by bit, NaN, several in one call.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <iterator>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "kernels/api/products.h"
#include "kernels/base/dtype.h"
#include "kernels/base/fixed_point.h"
#include "kernels/base/weight.h"
#include "kernels/conformance/conformance.h"
#include "kernels/conformance/device_memory.h"
#include "kernels/conformance/op_suite.h"
#include "kernels/conformance/product_case.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::conformance {
namespace {

class ProductLawsTest : public ::testing::TestWithParam<std::string> {
 protected:
  ProductLawsTest() : memory_(OpenedDevice(GetParam())) {}

  DeviceMemory memory_;
};

// All 65536 values of each 16-bit type, infinities and NaN too, times one and times what makes subnormals normal: the
// widening is exact. A subnormal result may be zero. On AMX, whose bf16 has no subnormal numbers and adds parts of an
// input, such weights are zero and infinite ones give NaN; so may they on tensor cores, which add parts too.
TEST_P(ProductLawsTest, WidensEveryWeightExactly) {
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
        const Floats y = Multiply(memory_, loaded, rows, Floats(static_cast<size_t>(rows), factor));
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

// Sums of whole numbers have one result on every device: the plain twin's.
TEST_P(ProductLawsTest, ProductsInFixedPointAreTheReferencesBits) {
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
                                 Multiply(memory_, memory_.Load(weight.view(), use), rows, of_rows)))
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
TEST_P(ProductLawsTest, InputsAtTheLimitsOfFixedPointAreTheReferences) {
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
        const Floats y = Multiply(memory_, memory_.Load(weight.view()), rows, of_rows);
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
TEST_P(ProductLawsTest, NotANumberStaysInItsRow) {
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
        const Floats y = Multiply(memory_, loaded, rows, x, activation);
        for (int64_t i = 0; i < rows * outputs; ++i) {
          EXPECT_EQ(std::isnan(y[i]), i / outputs == 4)
              << Name(dtype) << ", activation " << static_cast<int>(activation) << ", y[" << i << "]";
        }
      }
    }
    Floats x(static_cast<size_t>(rows * inputs), 0.25f);
    x[4 * inputs + 19] = INFINITY;
    const Floats y = Multiply(memory_, loaded, rows, x);
    const bool stays = absl::StartsWith(GetParam(), "cuda") && dtype == DType::kBFloat16;
    for (int64_t i = 0; i < rows * outputs; ++i) {
      EXPECT_EQ(std::isfinite(y[i]), i / outputs != 4) << Name(dtype) << ", y[" << i << "]";
      if (stays && i / outputs == 4) EXPECT_EQ(y[i], INFINITY) << Name(dtype) << ", y[" << i << "]";
    }
  }
}

// Seven products of one call, of all shapes and epilogues, have the bits of seven calls.
TEST_P(ProductLawsTest, TogetherTheyHaveTheBitsOfEachAlone) {
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
TEST_P(ProductLawsTest, ManyOfOneKindHaveTheBitsOfEachAlone) {
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

INSTANTIATE_TEST_SUITE_P(Backends, ProductLawsTest, ::testing::ValuesIn(Backends()),
                         [](const auto& info) { return TestName(info.param); });
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(OpTest);

}  // namespace
}  // namespace rwkv::kernels::conformance
