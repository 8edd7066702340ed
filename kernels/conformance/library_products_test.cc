// Products of devices on which another library computes those of many rows: each against its formula, and how far law
// N1 holds: within the rows to which they are padded.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/api/products.h"
#include "kernels/base/dtype.h"
#include "kernels/base/weight.h"
#include "kernels/conformance/bounded.h"
#include "kernels/conformance/conformance.h"
#include "kernels/conformance/device_memory.h"
#include "kernels/conformance/op_suite.h"
#include "kernels/conformance/product_case.h"
#include "kernels/cuda/library_rows.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/dispatch/open_device.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::conformance {
namespace {

// A GPU without the library has no such device.
std::vector<std::string> LibraryBackends() {
  std::vector<std::string> backends;
  for (const std::string& device : AvailableDevices()) {
    const std::string name = absl::StrCat(device, "/lt");
    if (absl::StartsWith(device, "cuda") && OpenDevice(name).ok()) backends.push_back(name);
  }
  if (cuda::HasEmulatedDevice()) backends.emplace_back(cuda::kEmulatedLibraryDevice);
  return backends;
}

int64_t LeastRows(const std::string& backend) {
  return cuda::IsEmulatedDevice(backend) ? cuda::kEmulatedLibraryRows : cuda::kLibraryRows;
}

std::vector<ProductCase> Cases(int64_t least) {
  std::vector<ProductCase> cases;
  const auto add = [&](const std::string& name, auto change) {
    ProductCase c;
    c.name = name;
    c.rows = least;
    change(c);
    c.inputs_of = c.storage.dtype;
    cases.push_back(c);
  };
  const int64_t half = least / 2;
  for (const Storage& storage : Storages()) {
    // Fewer rows than the library has, a bucket, one more, one less than the next, several buckets on; inputs and
    // outputs that are whole rows of memory or not.
    for (const int64_t rows : {least - 1, least, least + 1, least + half - 1, least + half, 3 * least - 1, 5 * least}) {
      for (const int64_t inputs : {1, 31, 64, 200}) {
        for (const int64_t outputs : {1, 6, 32, 67}) {
          add(absl::StrCat(storage.name, "_rows_", rows, "_inputs_", inputs, "_outputs_", outputs),
              [&](ProductCase& c) { c.storage = storage, c.rows = rows, c.inputs = inputs, c.outputs = outputs; });
        }
      }
    }
  }
  // Epilogues, where sums go to where they are wanted and where they do not.
  for (const int64_t rows : {least, least + 1}) {
    for (const int64_t outputs : {64, 33}) {
      const std::string of = absl::StrCat("_rows_", rows, "_outputs_", outputs);
      const auto with = [&](const std::string& name, auto change) {
        add(name + of, [&](ProductCase& c) { c.rows = rows, c.outputs = outputs, change(c); });
      };
      with("bias", [](ProductCase& c) { c.bias = true; });
      with("gate", [](ProductCase& c) { c.gate = true; });
      with("gate_in_place", [](ProductCase& c) { c.gate = c.in_place = c.bias = true; });
      with("accumulate", [](ProductCase& c) { c.accumulate = true; });
      with("accumulate_bias", [](ProductCase& c) { c.accumulate = c.bias = true; });
      with("accumulate_gate", [](ProductCase& c) { c.accumulate = c.gate = true; });
      for (const Activation activation :
           {Activation::kSigmoid, Activation::kTanh, Activation::kSquaredRelu, Activation::kSilu, Activation::kDecay}) {
        with(absl::StrCat("activation_", static_cast<int>(activation)),
             [&](ProductCase& c) { c.activation = activation; });
        with(absl::StrCat("accumulate_activation_", static_cast<int>(activation)),
             [&](ProductCase& c) { c.activation = activation, c.accumulate = true; });
      }
    }
  }
  return cases;
}

class LibraryProductsTest : public ::testing::TestWithParam<std::string> {
 protected:
  LibraryProductsTest() : memory_(OpenedDevice(GetParam())), least_(LeastRows(GetParam())) {}
  ~LibraryProductsTest() override { EXPECT_THAT(cuda::ViolationsOfEmulatedDevice(), ::testing::IsEmpty()); }

  // Rows of outputs of `weight`, with all that an epilogue has, or a plain product.
  Floats Run(const Weight* weight, const Floats& x, bool epilogue) {
    const int64_t outputs = weight->matrix.rows;
    const int64_t rows = static_cast<int64_t>(x.size()) / weight->matrix.cols;
    Product product;
    product.weight = weight;
    product.x = memory_.Put(x);
    product.y = memory_.Put(Floats(static_cast<size_t>(rows * outputs), 0.5f));
    product.accumulate = true;
    if (epilogue) {
      product.bias = memory_.Put(Floats(static_cast<size_t>(outputs), 0.25f));
      product.activation = Activation::kTanh;
    }
    EXPECT_OK(memory_.device().ops().products({rows, &product, 1}, memory_.stream()));
    return memory_.Get(product.y, rows * outputs);
  }

  DeviceMemory memory_;
  const int64_t least_;
};

TEST_P(LibraryProductsTest, EveryRowEqualsTheFormula) {
  for (const ProductCase& c : Cases(least_)) {
    const OpCase op = MakeProductCase(c);
    const Floats y = Compute(GetParam(), op, op.sequences, op.packing)[0].y;
    const Sequence& all = op.sequences[0];
    for (int64_t t = 0; t < all.length && !HasFailure(); ++t) {
      Sequence row;
      row.length = 1;
      for (const Floats& input : all.inputs) {
        const int64_t width = static_cast<int64_t>(input.size()) / all.length;
        row.inputs.emplace_back(input.begin() + t * width, input.begin() + (t + 1) * width);
      }
      const Floats mine(y.begin() + t * op.y_width, y.begin() + (t + 1) * op.y_width);
      EXPECT_TRUE(Within(op.formula(row).y, mine)) << c.name << ", row " << t;
    }
    if (HasFailure()) return;
  }
}

// Inputs that are no numbers of the weights' type become the nearest.
TEST_P(LibraryProductsTest, InputsBecomeTheNearestOfTheWeightsType) {
  Random random(23);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const StoredMatrix stored({"", dtype}, 33, 100, random.Uniforms(33 * 100, -1.0f, 1.0f));
    const Weight* const weight = memory_.Load(stored.view());
    const Floats x = random.Uniforms((least_ + 1) * 100, -2.0f, 2.0f);
    EXPECT_TRUE(SameBits(Run(weight, x, false), Run(weight, RoundTo(dtype, x), false))) << Name(dtype);
  }
}

// What prove.sh shows of a GPU, too: the library sums alike at every place of a bucket, and whether its sums are taken
// from where it writes them or not.
TEST_P(LibraryProductsTest, ARowHasTheSameBitsBesideAnyRowsOfItsBucketAndAtAnyPlace) {
  Random random(29);
  const std::vector<int64_t> buckets = cuda::LibraryBuckets(least_);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const auto& [outputs, inputs] : {std::pair<int64_t, int64_t>{48, 160}, {33, 70}}) {
      const StoredMatrix stored({"", dtype}, outputs, inputs, random.Uniforms(outputs * inputs, -1.0f, 1.0f));
      const Weight* const weight = memory_.Load(stored.view());
      const Floats row = random.Uniforms(inputs, -2.0f, 2.0f);
      for (const bool epilogue : {false, true}) {
        for (size_t b = 0; b < 5; ++b) {
          const int64_t fewest = b == 0 ? buckets[0] : buckets[b - 1] + 1;
          Floats first;
          for (const int64_t rows : {fewest, (fewest + buckets[b]) / 2, buckets[b]}) {
            for (const int64_t place : {int64_t{0}, rows / 3, rows - 1}) {
              Floats x = random.Uniforms(rows * inputs, -2.0f, 2.0f);
              std::copy(row.begin(), row.end(), x.begin() + place * inputs);
              const Floats y = Run(weight, x, epilogue);
              const Floats mine(y.begin() + place * outputs, y.begin() + (place + 1) * outputs);
              if (first.empty()) first = mine;
              EXPECT_TRUE(SameBits(first, mine)) << Name(dtype) << ", " << outputs << " outputs, row " << place
                                                 << " of " << rows << ", bucket " << buckets[b];
            }
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, LibraryProductsTest, ::testing::ValuesIn(LibraryBackends()),
                         [](const auto& info) { return TestName(info.param); });
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(LibraryProductsTest);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(OpTest);

}  // namespace
}  // namespace rwkv::kernels::conformance
