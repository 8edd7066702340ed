#include "kernels/base/matrix.h"

namespace rwkv::kernels {

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

}  // namespace rwkv::kernels
