// How a weight matrix lies in device memory.
#pragma once

#include <cstdint>

#include "kernels/base/matrix.h"

namespace rwkv::kernels::cuda {

enum class WeightKind : uint8_t { kFloat32, kBFloat16, kFloat16, kInt8, kInt4 };
constexpr int kWeightKinds = 5;

// Rows begin at multiples of this many bytes, so that eight weights are always there and aligned; zeros between them.
constexpr int64_t kWeightRowAlignment = 32;

struct DeviceWeight {
  const void* data = nullptr;
  int64_t pitch = 0;                   // bytes from row to row
  const uint16_t* scales = nullptr;    // [rows, groups]
  const uint16_t* minimums = nullptr;  // or null: zeros
  int32_t rows = 0;
  int32_t cols = 0;
  int32_t group = 0;
  int32_t groups = 0;  // of a row
  WeightKind kind = WeightKind::kFloat32;
};

inline int64_t PitchOf(const MatrixView& matrix) {
  return (RowBytes(matrix) + kWeightRowAlignment - 1) / kWeightRowAlignment * kWeightRowAlignment;
}

// Of a matrix that the device has loaded: pointers into its memory, never kBlocks.
inline DeviceWeight OnDevice(const MatrixView& matrix) {
  DeviceWeight weight;
  weight.data = matrix.data;
  weight.pitch = PitchOf(matrix);
  weight.rows = static_cast<int32_t>(matrix.rows);
  weight.cols = static_cast<int32_t>(matrix.cols);
  if (matrix.quantization == Quantization::kNone) {
    weight.kind = matrix.dtype == DType::kFloat32    ? WeightKind::kFloat32
                  : matrix.dtype == DType::kBFloat16 ? WeightKind::kBFloat16
                                                     : WeightKind::kFloat16;
    return weight;
  }
  weight.kind = matrix.quantization == Quantization::kInt8 ? WeightKind::kInt8 : WeightKind::kInt4;
  weight.scales = matrix.scales;
  weight.minimums = matrix.minimums;
  weight.group = static_cast<int32_t>(matrix.group);
  weight.groups = static_cast<int32_t>(GroupsPerRow(matrix));
  return weight;
}

}  // namespace rwkv::kernels::cuda
