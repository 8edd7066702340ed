// Products of devices that round their inputs to bf16.
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "kernels/conformance/conformance.h"
#include "kernels/conformance/device_memory.h"
#include "kernels/conformance/op_suite.h"
#include "kernels/conformance/product_case.h"
#include "kernels/cpu/emulated_amx.h"
#include "kernels/dispatch/open_device.h"

namespace rwkv::kernels::conformance {
namespace {

// Inputs that need no rounding give the formula.
std::vector<std::string> RoundingBackends() {
  if (!cpu::HasEmulatedAmx()) return {};
  std::vector<std::string> backends = {std::string(cpu::kEmulatedAmxBf16Device)};
  for (const char* const name : {"cpu/avx512/bf16", "cpu/amx/bf16"}) {
    if (OpenDevice(name).ok()) backends.emplace_back(name);
  }
  return backends;
}

std::vector<std::shared_ptr<const OpCase>> RoundedCases() {
  Table<ProductCase> table;
  for (int64_t rows : {1, 8, 17, 33, 70}) {
    for (int64_t inputs : {1, 31, 33, 768}) {
      for (int64_t outputs : {1, 150, 300}) {
        table.Add(absl::StrCat("rows_", rows, "_inputs_", inputs, "_outputs_", outputs), [=](ProductCase& c) {
          c.rows = rows, c.inputs = inputs, c.outputs = outputs, c.bf16_inputs = true;
          c.bias = rows % 2 == 1, c.accumulate = outputs == 150;
        });
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
          return Multiply(memory, memory.Load(weight.view()), rows, of);
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

}  // namespace
}  // namespace rwkv::kernels::conformance
