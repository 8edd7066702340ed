#include "kernels/conformance/conformance.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>

#include "absl/status/status.h"
#include "kernels/base/device.h"
#include "kernels/base/quantize.h"
#include "kernels/conformance/protected_device.h"
#include "kernels/cpu/emulated_amx.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/dispatch/open_device.h"

namespace rwkv::kernels::conformance {

float Random::Uniform(float low, float high) {
  const float unit = static_cast<float>(generator_() >> 8) * 0x1p-24f;  // [0, 1), exact
  return low + (high - low) * unit;
}

std::vector<float> Random::Uniforms(int64_t count, float low, float high) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = Uniform(low, high);
  return values;
}

std::vector<std::string> Backends() {
  std::vector<std::string> backends = AvailableDevices();
  backends.push_back("protected");
  if (cpu::HasEmulatedAmx()) backends.emplace_back(cpu::kEmulatedAmxDevice);
  if (cuda::HasEmulatedDevice()) {
    backends.emplace_back(cuda::kEmulatedDevice);
    backends.emplace_back(cuda::kEmulatedFp32Device);
  }
  return backends;
}

Device& OpenedDevice(const std::string& name) {
  static auto* const devices = new std::map<std::string, std::unique_ptr<Device>>;
  std::unique_ptr<Device>& device = (*devices)[name];
  if (device != nullptr) return *device;
  if (name == "protected") {
    device = ProtectDevice(*OpenDevice("cpu"));
  } else if (name == cpu::kEmulatedAmxDevice || name == cpu::kEmulatedAmxBf16Device) {
    device = *cpu::OpenEmulatedAmx(name);
  } else {
    device = cuda::IsEmulatedDevice(name) ? *cuda::OpenEmulatedDevice(name) : *OpenDevice(name);
  }
  return *device;
}

std::string TestName(std::string backend) {
  for (char& c : backend) c = std::isalnum(static_cast<unsigned char>(c)) != 0 ? c : '_';
  return backend;
}

::testing::AssertionResult AllClose(absl::Span<const float> expected, absl::Span<const float> actual,
                                    absl::Span<const double> tolerance) {
  if (expected.size() != actual.size() || expected.size() != tolerance.size()) {
    return ::testing::AssertionFailure() << "sizes differ: expected " << expected.size() << ", actual " << actual.size()
                                         << ", tolerances " << tolerance.size();
  }
  size_t failed = 0;
  size_t worst = 0;
  double worst_excess = -1.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::abs(static_cast<double>(actual[i]) - static_cast<double>(expected[i]));
    if (difference <= tolerance[i]) continue;
    ++failed;
    const double excess = std::isnan(difference) ? HUGE_VAL : difference - tolerance[i];
    if (excess > worst_excess) {
      worst_excess = excess;
      worst = i;
    }
  }
  if (failed == 0) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << failed << " of " << expected.size() << " elements are off; the worst is ["
                                       << worst << "]: expected " << expected[worst] << ", actual " << actual[worst]
                                       << ", tolerance " << tolerance[worst];
}

::testing::AssertionResult AllClose(absl::Span<const float> expected, absl::Span<const float> actual,
                                    double tolerance) {
  return AllClose(expected, actual, std::vector<double>(expected.size(), tolerance));
}

::testing::AssertionResult SameBits(absl::Span<const float> expected, absl::Span<const float> actual) {
  if (expected.size() != actual.size()) {
    return ::testing::AssertionFailure() << "sizes differ: expected " << expected.size() << ", actual "
                                         << actual.size();
  }
  size_t failed = 0;
  size_t first = 0;
  for (size_t i = expected.size(); i-- > 0;) {
    if (std::memcmp(&expected[i], &actual[i], sizeof(float)) != 0) {
      ++failed;
      first = i;
    }
  }
  if (failed == 0) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << failed << " of " << expected.size()
                                       << " elements have other bits; the first is [" << first << "]: expected "
                                       << std::hexfloat << expected[first] << ", actual " << actual[first];
}

std::vector<SequenceSpan> PackSpans(absl::Span<const int64_t> lengths, absl::Span<const int32_t> slots) {
  std::vector<SequenceSpan> spans;
  int64_t row = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    spans.push_back({slots[i], row, lengths[i]});
    row += lengths[i];
  }
  return spans;
}

std::vector<Storage> Storages() {
  return {
      {"fp32", DType::kFloat32},
      {"bf16", DType::kBFloat16},
      {"fp16", DType::kFloat16},
      {"int8", DType::kFloat16, Quantization::kInt8, 32, false},
      {"int8_group_64", DType::kFloat16, Quantization::kInt8, 64, false},
      {"int8_minimums", DType::kFloat16, Quantization::kInt8, 32, true},
      {"int4", DType::kFloat16, Quantization::kInt4, 32, true},
      {"int4_group_64", DType::kFloat16, Quantization::kInt4, 64, true},
  };
}

std::vector<Storage> BlockStorages() {
  std::vector<Storage> storages;
  for (BlockType type : {BlockType::kQ4_0, BlockType::kQ4_1, BlockType::kQ5_0, BlockType::kQ5_1, BlockType::kQ8_0,
                         BlockType::kQ4_K, BlockType::kQ5_K, BlockType::kQ6_K}) {
    Storage storage;
    storage.name = std::string(BlockTypeName(type));
    storage.quantization = Quantization::kBlocks;
    storage.blocks = type;
    storages.push_back(storage);
  }
  return storages;
}

namespace {

// Any bits are codes and packed scales; d and m make of them weights of about one.
std::vector<uint8_t> RandomBlocks(BlockType type, int64_t bytes) {
  Random random(67);
  std::vector<uint8_t> blocks;
  for (float byte : random.Uniforms(bytes, 0.0f, 256.0f)) blocks.push_back(static_cast<uint8_t>(byte));
  const float scale = BlockWeights(type) == 32 ? (type == BlockType::kQ8_0 ? 1.0f / 128 : 1.0f / 16) : 1.0f / 1024;
  for (int64_t at = ScaleOffset(type); at < bytes; at += BlockBytes(type)) {
    const std::vector<float> halves = random.Uniforms(2, -scale, scale);
    NarrowFromFloat(DType::kFloat16, halves.data(), HasMinimumScale(type) ? 2 : 1, &blocks[at]);
  }
  return blocks;
}

}  // namespace

StoredMatrix::StoredMatrix(const Storage& how, int64_t row_count, int64_t col_count, absl::Span<const float> values)
    : storage(how), rows(row_count), cols(col_count) {
  const int64_t row_bytes = RowBytes(view());
  const int64_t groups = GroupsPerRow(view());
  if (storage.quantization == Quantization::kBlocks) {
    data = RandomBlocks(storage.blocks, rows * row_bytes);
  } else {
    data.resize(static_cast<size_t>(rows * row_bytes));
  }
  scales.resize(static_cast<size_t>(rows * groups));
  if (storage.has_minimums) minimums.resize(scales.size());
  for (int64_t row = 0; row < rows; ++row) {
    const float* const from = values.data() + row * cols;
    uint8_t* const to = data.data() + row * row_bytes;
    if (storage.quantization == Quantization::kNone) {
      NarrowFromFloat(storage.dtype, from, cols, to);
    } else if (storage.quantization != Quantization::kBlocks) {
      const absl::Status status =
          QuantizeRow(storage.quantization, storage.group, from, cols, to, scales.data() + row * groups,
                      storage.has_minimums ? minimums.data() + row * groups : nullptr);
      EXPECT_TRUE(status.ok()) << status;
    }
  }
  // The quantizer makes no minimums for int8; any will do.
  if (storage.quantization == Quantization::kInt8) {
    for (size_t i = 0; i < minimums.size(); ++i) minimums[i] = FloatToHalf(0.03f * static_cast<float>(i % 7) - 0.1f);
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) widened.push_back(LoadAsFloat(view(), row, col));
  }
}

MatrixView StoredMatrix::view() const {
  MatrixView matrix = {storage.dtype, rows, cols, data.data()};
  matrix.quantization = storage.quantization;
  matrix.blocks = storage.blocks;
  if (storage.group != 0) {
    matrix.group = storage.group;
    matrix.scales = scales.data();
    if (storage.has_minimums) matrix.minimums = minimums.data();
  }
  return matrix;
}

}  // namespace rwkv::kernels::conformance
