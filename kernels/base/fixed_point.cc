#include "kernels/base/fixed_point.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace rwkv::kernels {

int64_t FixedPointGroup(const MatrixView& matrix) {
  switch (matrix.quantization) {
    case Quantization::kNone:
      return 0;
    case Quantization::kInt8:
    case Quantization::kInt4:
      return matrix.group;
    case Quantization::kBlocks:
      return matrix.blocks == BlockType::kQ8_0 || matrix.blocks == BlockType::kQ4_0 ? 32 : 0;
  }
  return 0;
}

float ToFixedPoint(const float* x, int64_t count, int16_t* q) {
  float largest = 0.0f;
  bool finite = true;
  for (int64_t k = 0; k < count; ++k) {
    finite = finite && std::isfinite(x[k]);
    largest = std::max(largest, std::abs(x[k]));
  }
  std::fill_n(q, count, int16_t{0});
  if (!finite) return std::numeric_limits<float>::quiet_NaN();
  if (largest < kSmallestFixedPointMaximum) return 0.0f;
  const float inverse = kLargestFixedPoint / largest;
  for (int64_t k = 0; k < count; ++k) q[k] = static_cast<int16_t>(std::nearbyint(x[k] * inverse));
  return largest / kLargestFixedPoint;
}

}  // namespace rwkv::kernels
