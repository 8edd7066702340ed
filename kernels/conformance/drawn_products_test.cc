// Products of whole numbers of drawn shapes, inputs and weights: on every backend the bits of the plain twin. What is
// drawn is what models have that nobody has tried: an odd number of groups or blocks, sizes about the borders of tiles,
// no inputs but zeros, one channel far above all others, weights that are the least or the largest of their kind.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "kernels/base/fixed_point.h"
#include "kernels/base/ggml_blocks.h"
#include "kernels/base/matrix.h"
#include "kernels/base/weight.h"
#include "kernels/conformance/conformance.h"
#include "kernels/conformance/device_memory.h"
#include "kernels/conformance/op_suite.h"
#include "kernels/conformance/product_case.h"
#include "kernels/cuda/testing/emulated_cuda.h"

namespace rwkv::kernels::conformance {
namespace {

constexpr int64_t kMostRows = 70;
constexpr int64_t kRowsOfInputs = 3;  // After so many rows their inputs' kind comes again.

enum class Inputs { kPlain, kZeros, kNegativeZeros, kFewNumbers, kLargeChannel, kSmall, kKinds };
enum class Weights {
  kPlain,
  kZeroRows,
  kSmallestScales,
  kLargestScales,
  kNegativeScales,
  kLeastCodes,
  kMostCodes,
  kKinds
};

class Draw {
 public:
  explicit Draw(Random* random) : random_(random) {}

  template <typename T, size_t kCount>
  T Of(const T (&choices)[kCount]) const {
    return choices[Below(kCount)];
  }
  template <typename Kind>
  Kind Any() const {
    return static_cast<Kind>(Below(static_cast<int64_t>(Kind::kKinds)));
  }
  int64_t Below(int64_t count) const {
    return std::min(static_cast<int64_t>(random_->Uniform(0.0f, static_cast<float>(count))), count - 1);
  }

 private:
  Random* random_;
};

std::vector<Storage> WholeNumberStorages() {
  std::vector<Storage> storages;
  for (const Storage& storage : Storages()) {
    if (storage.quantization != Quantization::kNone) storages.push_back(storage);
  }
  for (const Storage& storage : BlockStorages()) {
    if (storage.blocks == BlockType::kQ8_0 || storage.blocks == BlockType::kQ4_0) storages.push_back(storage);
  }
  return storages;
}

Floats DrawInputs(Inputs kind, int64_t inputs, Random* random) {
  Floats x = random->Uniforms(inputs, -2.0f, 2.0f);
  const Draw draw(random);
  switch (kind) {
    case Inputs::kPlain:
    case Inputs::kKinds:
      break;
    case Inputs::kZeros:
      std::fill(x.begin(), x.end(), 0.0f);
      break;
    case Inputs::kNegativeZeros:
      for (size_t i = 0; i < x.size(); i += 1 + i % 3) x[i] = -0.0f;
      break;
    case Inputs::kFewNumbers: {
      const Floats all = x;
      std::fill(x.begin(), x.end(), 0.0f);
      for (int i = 0; i < 3; ++i) {
        const int64_t at = draw.Below(inputs);
        x[at] = all[at];
      }
      break;
    }
    case Inputs::kLargeChannel:
      x[draw.Below(inputs)] = 1e30f;
      break;
    case Inputs::kSmall:
      for (float& number : x) number *= 0x1p-60f;
      break;
  }
  return x;
}

// The scales and codes of a stored matrix become those of the kind.
void MakeWeights(Weights kind, StoredMatrix* weight) {
  const bool blocks = weight->storage.quantization == Quantization::kBlocks;
  const auto of_scale = [kind](uint16_t scale, int64_t row, int64_t place) -> uint16_t {
    switch (kind) {
      case Weights::kZeroRows:
        return row % 3 == 1 ? 0 : scale;
      case Weights::kSmallestScales:
        return static_cast<uint16_t>(1 + place % 3);  // Subnormal.
      case Weights::kLargestScales:
        return 0x7bff;  // 65504
      case Weights::kNegativeScales:
        return place % 4 == 0 ? 0x8000 : static_cast<uint16_t>(scale ^ 0x8000);  // -0 among them.
      default:
        return scale;
    }
  };
  const int64_t bytes_of_block = blocks ? BlockBytes(weight->storage.blocks) : 1;
  const int64_t row_bytes = RowBytes(weight->view());
  const bool bytes = weight->storage.quantization == Quantization::kInt8 || weight->storage.blocks == BlockType::kQ8_0;
  for (int64_t row = 0; row < weight->rows; ++row) {
    for (int64_t i = 0; i < row_bytes; ++i) {
      uint8_t& byte = weight->data[row * row_bytes + i];
      if (blocks && i % bytes_of_block < 2) {
        if (i % bytes_of_block == 1) continue;
        const auto scale = static_cast<uint16_t>(byte | weight->data[row * row_bytes + i + 1] << 8);
        const uint16_t changed = of_scale(scale, row, i / bytes_of_block);
        byte = static_cast<uint8_t>(changed & 0xff);
        weight->data[row * row_bytes + i + 1] = static_cast<uint8_t>(changed >> 8);
        continue;
      }
      if (kind == Weights::kLeastCodes) byte = bytes ? 0x80 : 0x00;
      if (kind == Weights::kMostCodes) byte = bytes ? 0x7f : 0xff;
    }
  }
  const auto groups = static_cast<int64_t>(weight->scales.size()) / weight->rows;
  for (size_t i = 0; i < weight->scales.size(); ++i) {
    const auto place = static_cast<int64_t>(i);
    weight->scales[i] = of_scale(weight->scales[i], place / groups, place % groups);
    if (!weight->minimums.empty()) weight->minimums[i] = of_scale(weight->minimums[i], place / groups, place % groups);
  }
}

class DrawnProductsTest : public ::testing::TestWithParam<std::string> {};

TEST_P(DrawnProductsTest, AreTheReferencesBits) {
  constexpr int64_t kInputs[] = {1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 160, 193, 1000, 2080};
  constexpr int64_t kBlocks[] = {1, 2, 3, 4, 5, 7, 9, 37};
  constexpr int64_t kOutputs[] = {1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 257};
  constexpr int64_t kRows[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, kMostRows};
  const int draws = cuda::IsEmulatedDevice(GetParam()) ? 3 : 30;
  Random random(41);
  const Draw draw(&random);
  for (const Storage& storage : WholeNumberStorages()) {
    for (int i = 0; i < draws; ++i) {
      DeviceMemory memory(OpenedDevice(GetParam()));
      DeviceMemory reference(OpenedDevice("reference"));
      const bool blocks = storage.quantization == Quantization::kBlocks;
      const int64_t inputs = blocks ? 32 * draw.Of(kBlocks) : draw.Of(kInputs);
      const int64_t outputs = draw.Of(kOutputs);
      const auto weights = draw.Any<Weights>();
      StoredMatrix weight(storage, outputs, inputs, random.Uniforms(outputs * inputs, -1.0f, 1.0f));
      MakeWeights(weights, &weight);
      ASSERT_NE(FixedPointGroup(weight.view()), 0) << storage.name;
      Inputs kinds[kRowsOfInputs];
      for (Inputs& kind : kinds) kind = draw.Any<Inputs>();
      Floats x;
      for (int64_t row = 0; row < kMostRows; ++row) {
        const Floats of_row = DrawInputs(kinds[row % kRowsOfInputs], inputs, &random);
        x.insert(x.end(), of_row.begin(), of_row.end());
      }
      const Floats expected = Multiply(reference, reference.Load(weight.view()), kMostRows, x);
      for (const WeightUse use : {WeightUse::kProduct, WeightUse::kSparseProduct}) {
        const Weight* const loaded = memory.Load(weight.view(), use);
        for (const int64_t rows : {int64_t{1}, draw.Of(kRows), draw.Of(kRows), draw.Of(kRows)}) {
          const int64_t begin = draw.Below(std::min<int64_t>(kMostRows - rows + 1, 2 * kRowsOfInputs));
          const Floats of_rows(x.begin() + begin * inputs, x.begin() + (begin + rows) * inputs);
          const auto want = absl::MakeConstSpan(expected).subspan(begin * outputs, rows * outputs);
          ASSERT_TRUE(SameBits(want, Multiply(memory, loaded, rows, of_rows)))
              << storage.name << ", " << inputs << " inputs, " << outputs << " outputs, " << rows << " rows from "
              << begin << ", use " << static_cast<int>(use) << ", weights " << static_cast<int>(weights) << ", inputs "
              << static_cast<int>(kinds[0]) << " " << static_cast<int>(kinds[1]) << " " << static_cast<int>(kinds[2]);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, DrawnProductsTest, ::testing::ValuesIn(Backends()),
                         [](const auto& info) { return TestName(info.param); });
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(OpTest);

}  // namespace
}  // namespace rwkv::kernels::conformance
