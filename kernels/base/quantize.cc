#include "kernels/base/quantize.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "kernels/base/dtype.h"
#include "kernels/base/finite.h"

namespace rwkv::kernels {
namespace {

constexpr uint16_t kSign = 0x8000;

// The smallest half >= value, where value >= 0; infinite above the largest one.
uint16_t HalfAtLeast(double value) {
  uint16_t half = FloatToHalf(static_cast<float>(value));
  if (static_cast<double>(HalfToFloat(half)) < value) ++half;
  return half;
}

// The largest half <= value; infinite below the smallest one.
uint16_t HalfAtMost(float value) {
  if (value < 0.0f) return kSign | HalfAtLeast(-static_cast<double>(value));
  uint16_t half = FloatToHalf(value);
  if (HalfToFloat(half) > value) --half;
  return half;
}

// The code of `distance` above the group's minimum (or zero); a scale of zero has one code.
int64_t CodeOf(double distance, float scale) {
  return scale > 0.0f ? std::llround(distance / static_cast<double>(scale)) : 0;
}

absl::Status TooLarge(float largest) {
  return absl::InvalidArgumentError(absl::StrCat("quantize: a weight of ", largest, " is too large for an fp16 scale"));
}

absl::Status QuantizeInt8(const float* weights, int64_t count, uint8_t* codes, uint16_t* scale_bits) {
  float largest = 0.0f;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(weights[i]));
  *scale_bits = HalfAtLeast(static_cast<double>(largest) / 127.0);
  const float scale = HalfToFloat(*scale_bits);
  if (!std::isfinite(scale)) return TooLarge(largest);
  for (int64_t i = 0; i < count; ++i) {
    codes[i] = static_cast<uint8_t>(static_cast<int8_t>(CodeOf(static_cast<double>(weights[i]), scale)));
  }
  return absl::OkStatus();
}

absl::Status QuantizeInt4(const float* weights, int64_t count, uint8_t* codes, uint16_t* scale_bits,
                          uint16_t* minimum_bits) {
  const auto [smallest, largest] = std::minmax_element(weights, weights + count);
  *minimum_bits = HalfAtMost(*smallest);
  const double minimum = static_cast<double>(HalfToFloat(*minimum_bits));
  if (!std::isfinite(minimum)) return TooLarge(*smallest);
  *scale_bits = HalfAtLeast((static_cast<double>(*largest) - minimum) / 15.0);
  const float scale = HalfToFloat(*scale_bits);
  if (!std::isfinite(scale)) return TooLarge(*largest);
  for (int64_t i = 0; i < count; ++i) {
    const auto code = static_cast<uint8_t>(CodeOf(static_cast<double>(weights[i]) - minimum, scale));
    codes[i / 2] = i % 2 == 0 ? code : static_cast<uint8_t>(codes[i / 2] | (code << 4));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status QuantizeRow(Quantization quantization, int64_t group, const float* weights, int64_t count, uint8_t* codes,
                         uint16_t* scales, uint16_t* minimums) {
  if (quantization != Quantization::kInt8 && quantization != Quantization::kInt4) {
    return absl::InvalidArgumentError(absl::StrCat("quantize: to ", Name(quantization), ", expected int8 or int4"));
  }
  if (!IsGroupSize(group)) {
    return absl::InvalidArgumentError(absl::StrCat("quantize: groups of ", group, " weights, expected 32 or 64"));
  }
  if (const int64_t bad = FindNotFinite(DType::kFloat32, weights, count); bad >= 0) {
    return absl::InvalidArgumentError(absl::StrCat("quantize: weight ", bad, " is ", weights[bad]));
  }
  for (int64_t begin = 0; begin < count; begin += group) {
    const int64_t size = std::min(group, count - begin);
    const int64_t g = begin / group;
    const absl::Status status = quantization == Quantization::kInt8
                                    ? QuantizeInt8(weights + begin, size, codes + begin, scales + g)
                                    : QuantizeInt4(weights + begin, size, codes + begin / 2, scales + g, minimums + g);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

double QuantizationErrorBound(float weight, uint16_t scale) {
  const double step = static_cast<double>(HalfToFloat(scale));
  return step / 2 + 0x1p-23 * (std::abs(static_cast<double>(weight)) + step);
}

}  // namespace rwkv::kernels
