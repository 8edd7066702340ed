// Products of devices that round their inputs to the type of 16-bit weights.
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "kernels/conformance/conformance.h"
#include "kernels/conformance/device_memory.h"
#include "kernels/conformance/op_suite.h"
#include "kernels/conformance/product_case.h"
#include "kernels/cpu/emulated_amx.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/dispatch/open_device.h"

namespace rwkv::kernels::conformance {
namespace {

bool IsCuda(const std::string& backend) { return absl::StartsWith(backend, "cuda"); }

std::vector<std::string> RoundingBackends() {
  std::vector<std::string> backends;
  if (cpu::HasEmulatedAmx()) {
    backends.emplace_back(cpu::kEmulatedAmxBf16Device);
    for (const char* const name : {"cpu/avx512/bf16", "cpu/amx/bf16"}) {
      if (OpenDevice(name).ok()) backends.emplace_back(name);
    }
  }
  for (const std::string& device : AvailableDevices()) {
    if (IsCuda(device)) backends.push_back(absl::StrCat(device, "/rounded"));
  }
  if (cuda::HasEmulatedDevice()) backends.emplace_back(cuda::kEmulatedRoundedDevice);
  return backends;
}

// A device that gives the same bits of products with weights for which the other does not round.
std::string Unrounding(const std::string& backend) {
  if (!IsCuda(backend)) return "cpu/avx512vnni";
  return backend.substr(0, backend.rfind("/rounded"));
}

// Inputs that need no rounding give the formula.
std::vector<std::shared_ptr<const OpCase>> RoundedCases() {
  Table<ProductCase> table;
  for (const Storage& storage : Storages()) {
    if (SizeOf(storage.dtype) != 2 || storage.quantization != Quantization::kNone) continue;
    for (int64_t rows : {1, 8, 17, 33, 70}) {
      for (int64_t inputs : {1, 31, 33, 768}) {
        for (int64_t outputs : {1, 150, 300}) {
          const std::string name = absl::StrCat(storage.name, "_rows_", rows, "_inputs_", inputs, "_outputs_", outputs);
          table.Add(name, [=](ProductCase& c) {
            c.storage = storage, c.inputs_of = storage.dtype;
            c.rows = rows, c.inputs = inputs, c.outputs = outputs;
            c.bias = rows % 2 == 1, c.accumulate = outputs == 150;
          });
        }
      }
    }
  }
  return table.Build(MakeProductCase);
}

INSTANTIATE_TEST_SUITE_P(RoundingProducts, OpTest,
                         ::testing::Combine(::testing::ValuesIn(RoundingBackends()),
                                            ::testing::ValuesIn(RoundedCases())),
                         OpTestName);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(OpTest);

// What such a device makes of any inputs is what it makes of the nearest numbers of the weights' type: on a CPU of bf16
// alone. Other weights are multiplied as everywhere.
TEST(RoundingProductsTest, InputsBecomeTheNearestOfTheWeightsType) {
  Random random(19);
  for (const std::string& backend : RoundingBackends()) {
    for (const int64_t rows : {1, 20, 40}) {
      for (const Storage& storage : Storages()) {
        const bool rounds =
            storage.quantization == Quantization::kNone &&
            (storage.dtype == DType::kBFloat16 || (IsCuda(backend) && storage.dtype == DType::kFloat16));
        const int64_t inputs = 100, outputs = 50;
        const StoredMatrix weight(storage, outputs, inputs, random.Uniforms(outputs * inputs, -1.0f, 1.0f));
        const Floats x = random.Uniforms(rows * inputs, -2.0f, 2.0f);
        const auto multiply = [&](const std::string& device, const Floats& of) {
          DeviceMemory memory(OpenedDevice(device));
          return Multiply(memory, memory.Load(weight.view()), rows, of);
        };
        const std::string other = Unrounding(backend);
        const Floats y = multiply(backend, x);
        EXPECT_TRUE(SameBits(y, multiply(rounds ? backend : other, rounds ? RoundTo(storage.dtype, x) : x)))
            << backend << ", " << storage.name << ", " << rows << " rows";
        const std::string exact = IsCuda(backend) ? other : std::string(cpu::kEmulatedAmxDevice);
        EXPECT_EQ(SameBits(y, multiply(exact, x)), !rounds)
            << backend << ", " << storage.name << ", " << rows << " rows";
      }
    }
  }
}

// A number that is none, or beyond the weights' type, is told in its row and no other.
TEST(RoundingProductsTest, InputsBeyondTheWeightsTypeAreInfinite) {
  for (const std::string& backend : RoundingBackends()) {
    if (!IsCuda(backend)) continue;
    DeviceMemory memory(OpenedDevice(backend));
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      for (const float value : {65519.0f, 65520.0f, 3.4e38f, INFINITY, NAN}) {
        const StoredMatrix weight({"", dtype}, 6, 20, Floats(6 * 20, 0.5f));
        Floats x(9 * 20, 0.25f);
        x[4 * 20 + 19] = value;
        const float rounded = RoundTo(dtype, {value})[0];
        const Floats y = Multiply(memory, memory.Load(weight.view()), 9, x);
        for (int64_t i = 0; i < 9 * 6; ++i) {
          if (i / 6 != 4) {
            EXPECT_EQ(y[i], 2.5f) << value;
          } else {
            EXPECT_TRUE(std::isnan(rounded) ? std::isnan(y[i]) : y[i] == 0.5f * (rounded + 19 * 0.25f)) << y[i];
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace rwkv::kernels::conformance
