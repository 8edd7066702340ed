#include "kernels/reference/fixed_point_row.h"

#include <algorithm>
#include <cstring>

#include "kernels/base/dtype.h"
#include "kernels/base/fixed_point.h"
#include "kernels/base/ggml_blocks.h"

namespace rwkv::kernels::reference {
namespace {

// A group's weights are code * scale + minimum.
struct Group {
  int8_t codes[64];
  float scale;
  float minimum;
};

// That of output o from input `begin` on, of `count` weights.
Group GroupOf(const MatrixView& weight, int64_t o, int64_t begin, int64_t count) {
  Group group = {};
  const auto* const row = static_cast<const uint8_t*>(weight.data) + o * RowBytes(weight);
  if (weight.quantization == Quantization::kBlocks) {
    const uint8_t* const block = row + begin / 32 * BlockBytes(weight.blocks);
    DecodeBlocks(weight.blocks, BlockPart::kQuants, block, 1, reinterpret_cast<uint8_t*>(group.codes));
    uint16_t scale;
    std::memcpy(&scale, block + ScaleOffset(weight.blocks), sizeof scale);
    group.scale = HalfToFloat(scale);
    return group;
  }
  for (int64_t k = begin; k < begin + count; ++k) {
    const int code = weight.quantization == Quantization::kInt8 ? row[k]
                     : k % 2 == 0                               ? row[k / 2] & 0xf
                                                                : row[k / 2] >> 4;
    group.codes[k - begin] = static_cast<int8_t>(code);
  }
  const int64_t at = o * GroupsPerRow(weight) + begin / weight.group;
  group.scale = HalfToFloat(weight.scales[at]);
  if (weight.minimums != nullptr) group.minimum = HalfToFloat(weight.minimums[at]);
  return group;
}

}  // namespace

FixedPointRow::FixedPointRow(const MatrixView& weight, const float* x)
    : group_(FixedPointGroup(weight)), q_(static_cast<size_t>(weight.cols)) {
  for (int64_t k = 0; k < weight.cols; k += group_) {
    scales_.push_back(ToFixedPoint(x + k, std::min(group_, weight.cols - k), q_.data() + k));
  }
}

float FixedPointRow::Dot(const MatrixView& weight, int64_t o) const {
  float y = 0.0f;
  for (int64_t begin = 0; begin < weight.cols; begin += group_) {
    const int64_t count = std::min(group_, weight.cols - begin);
    const Group group = GroupOf(weight, o, begin, count);
    int32_t products = 0;
    int32_t sum = 0;
    for (int64_t k = 0; k < count; ++k) {
      products += group.codes[k] * q_[begin + k];
      sum += q_[begin + k];
    }
    const float scale = scales_[begin / group_];
    y = y + (static_cast<float>(products) * scale) * group.scale;
    if (weight.minimums != nullptr) y = y + (static_cast<float>(sum) * scale) * group.minimum;
  }
  return y;
}

}  // namespace rwkv::kernels::reference
