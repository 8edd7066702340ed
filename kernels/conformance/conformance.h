// What the conformance tests share: seeded inputs, the backends, comparisons that say where and by how much.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "kernels/api/sequence_span.h"
#include "kernels/base/device.h"
#include "kernels/base/dtype.h"
#include "kernels/base/ggml_blocks.h"
#include "kernels/base/matrix.h"

namespace rwkv::kernels::conformance {

constexpr double kUnitRoundoff = 0x1p-24;  // of float, to nearest
constexpr double kFunctionUlps = 4.0;      // bound of exp, sigmoid, tanh of any backend, in units of 2 * kUnitRoundoff

// The same numbers on every machine for one seed.
class Random {
 public:
  explicit Random(uint32_t seed) : generator_(seed) {}
  float Uniform(float low, float high);
  std::vector<float> Uniforms(int64_t count, float low, float high);

 private:
  std::mt19937 generator_;
};

// Every device this machine opens by its name (kernels/dispatch); "protected", the fastest CPU with its memory out of
// the host's reach; and "cuda/emulated" where the build has CUDA's headers.
std::vector<std::string> Backends();

// The device of that name, opened once in the process.
Device& OpenedDevice(const std::string& name);

// "cpu/avx2" -> "cpu_avx2", for names of parametrised tests.
std::string TestName(std::string backend);

// |actual - expected| <= tolerance for every element, NaN fails. A failure tells the worst element and how many failed.
::testing::AssertionResult AllClose(absl::Span<const float> expected, absl::Span<const float> actual,
                                    absl::Span<const double> tolerance);
::testing::AssertionResult AllClose(absl::Span<const float> expected, absl::Span<const float> actual, double tolerance);

// Equal bit for bit (so a NaN equals itself, and 0 does not equal -0).
::testing::AssertionResult SameBits(absl::Span<const float> expected, absl::Span<const float> actual);

// Spans of `lengths[i]` rows for slot `slots[i]`, packed one after the other.
std::vector<SequenceSpan> PackSpans(absl::Span<const int64_t> lengths, absl::Span<const int32_t> slots);

// How a matrix is stored.
struct Storage {
  std::string name;
  DType dtype = DType::kFloat32;
  Quantization quantization = Quantization::kNone;
  int64_t group = 0;
  bool has_minimums = false;
  BlockType blocks = BlockType::kNone;
};

// Every kind that backends compute with and rows of any number of columns.
std::vector<Storage> Storages();
// ggml's blocks: rows of multiples of BlockWeights() columns, which 256 is for each.
std::vector<Storage> BlockStorages();

// A matrix as a checkpoint may hold it. Of blocks there is no quantizer: they are random, and as large as `values` only
// by order of magnitude.
struct StoredMatrix {
  StoredMatrix() = default;
  StoredMatrix(const Storage& storage, int64_t rows, int64_t cols, absl::Span<const float> values);
  MatrixView view() const;  // Of this object's memory.

  Storage storage;
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<uint8_t> data;
  std::vector<uint16_t> scales;
  std::vector<uint16_t> minimums;
  std::vector<float> widened;  // [rows, cols], the floats that it stands for
};

}  // namespace rwkv::kernels::conformance
