#include "kernels/base/matrix.h"

#include "absl/strings/str_cat.h"

namespace rwkv::kernels {
namespace {

constexpr int64_t kSizeLimit = int64_t{1} << 31;

bool IsAligned(const void* pointer, int64_t alignment) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(alignment) == 0;
}

absl::Status CheckQuantization(absl::string_view name, const MatrixView& matrix) {
  if (matrix.quantization == Quantization::kBlocks) {
    if (BlockBytes(matrix.blocks) == 0 || matrix.cols % BlockWeights(matrix.blocks) != 0) {
      return absl::InvalidArgumentError(absl::StrCat(name, " has rows of ", matrix.cols, " weights, which ",
                                                     BlockTypeName(matrix.blocks), " blocks do not fill"));
    }
    return absl::OkStatus();
  }
  if (matrix.quantization != Quantization::kInt8 && matrix.quantization != Quantization::kInt4) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " has unknown quantization ", static_cast<int>(matrix.quantization)));
  }
  if (matrix.dtype != DType::kFloat16) {
    return absl::InvalidArgumentError(absl::StrCat(name, " has scales of ", Name(matrix.dtype), ", expected fp16"));
  }
  if (!IsGroupSize(matrix.group)) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " has groups of ", matrix.group, " weights, expected 32 or 64"));
  }
  const bool needs_minimums = matrix.quantization == Quantization::kInt4;
  if (matrix.scales == nullptr || (needs_minimums && matrix.minimums == nullptr)) {
    return absl::InvalidArgumentError(absl::StrCat(name, " is ", Name(matrix.quantization), " and has no ",
                                                   matrix.scales == nullptr ? "scales" : "minimums"));
  }
  if (!IsAligned(matrix.scales, 2) || !IsAligned(matrix.minimums, 2)) {
    return absl::InvalidArgumentError(absl::StrCat(name, " has scales or minimums that are not aligned to 2 bytes"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::string_view Name(Quantization quantization) {
  switch (quantization) {
    case Quantization::kNone:
      return "none";
    case Quantization::kInt8:
      return "int8";
    case Quantization::kInt4:
      return "int4";
    case Quantization::kBlocks:
      return "blocks";
  }
  return "unknown";
}

int64_t RowBytes(const MatrixView& matrix) {
  switch (matrix.quantization) {
    case Quantization::kNone:
      return matrix.cols * SizeOf(matrix.dtype);
    case Quantization::kInt8:
      return matrix.cols;
    case Quantization::kInt4:
      return (matrix.cols + 1) / 2;
    case Quantization::kBlocks:
      return matrix.cols / BlockWeights(matrix.blocks) * BlockBytes(matrix.blocks);
  }
  return 0;
}

MatrixView RowsOf(const MatrixView& matrix, int64_t begin, int64_t rows) {
  MatrixView part = matrix;
  part.rows = rows;
  part.data = static_cast<const char*>(matrix.data) + begin * RowBytes(matrix);
  if (matrix.scales != nullptr) part.scales += begin * GroupsPerRow(matrix);
  if (matrix.minimums != nullptr) part.minimums += begin * GroupsPerRow(matrix);
  return part;
}

int64_t SizeInBytes(const MatrixView& matrix) {
  const int64_t arrays = (matrix.scales != nullptr ? 1 : 0) + (matrix.minimums != nullptr ? 1 : 0);
  return matrix.rows * (RowBytes(matrix) + arrays * GroupsPerRow(matrix) * SizeOf(matrix.dtype));
}

float LoadAsFloat(const MatrixView& matrix, int64_t row, int64_t col) {
  const char* const data = static_cast<const char*>(matrix.data) + row * RowBytes(matrix);
  int q = 0;
  switch (matrix.quantization) {
    case Quantization::kNone:
      return LoadAsFloat(matrix.dtype, data, col);
    case Quantization::kInt8:
      q = static_cast<signed char>(data[col]);
      break;
    case Quantization::kInt4: {
      const int pair = static_cast<unsigned char>(data[col / 2]);
      q = col % 2 == 0 ? pair & 0xf : pair >> 4;
      break;
    }
    case Quantization::kBlocks:
      return BlockWeight(matrix.blocks, reinterpret_cast<const uint8_t*>(data), col);
  }
  const int64_t group = row * GroupsPerRow(matrix) + col / matrix.group;
  const float product = static_cast<float>(q) * LoadAsFloat(matrix.dtype, matrix.scales, group);
  return product + (matrix.minimums != nullptr ? LoadAsFloat(matrix.dtype, matrix.minimums, group) : 0.0f);
}

absl::Status CheckMatrix(absl::string_view name, const MatrixView& matrix) {
  if (matrix.rows < 1 || matrix.rows >= kSizeLimit || matrix.cols < 1 || matrix.cols >= kSizeLimit) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is [", matrix.rows, ", ", matrix.cols, "], its sizes are not in [1, 2^31)"));
  }
  switch (matrix.dtype) {
    case DType::kFloat32:
    case DType::kBFloat16:
    case DType::kFloat16:
      break;
    default:
      return absl::InvalidArgumentError(absl::StrCat(name, " has unknown dtype ", static_cast<int>(matrix.dtype)));
  }
  if (matrix.data == nullptr) return absl::InvalidArgumentError(absl::StrCat(name, " is null"));
  if (matrix.quantization != Quantization::kNone) return CheckQuantization(name, matrix);
  if (!IsAligned(matrix.data, SizeOf(matrix.dtype))) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is not aligned to its element of ", SizeOf(matrix.dtype), " bytes"));
  }
  return absl::OkStatus();
}

}  // namespace rwkv::kernels
