#include "kernels/base/dtype.h"

#include <cmath>
#include <cstring>

namespace rwkv::kernels {
namespace {

uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float FloatOf(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint16_t Load16(const void* data, int64_t index) {
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(data) + index * 2, sizeof(bits));
  return bits;
}

}  // namespace

int64_t SizeOf(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

absl::string_view Name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "fp32";
    case DType::kBFloat16:
      return "bf16";
    case DType::kFloat16:
      return "fp16";
  }
  return "unknown";
}

float BFloat16ToFloat(uint16_t bits) { return FloatOf(uint32_t{bits} << 16); }

float HalfToFloat(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
  const uint32_t exponent = (bits >> 10) & 0x1f;
  const uint32_t mantissa = bits & 0x3ff;
  if (exponent == 0x1f) {
    const uint32_t quiet = mantissa != 0 ? 0x400000u : 0u;  // as vcvtph2ps does
    return FloatOf(sign | 0x7f800000u | quiet | (mantissa << 13));
  }
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // Exact: zero or a half subnormal.
    return FloatOf(sign | BitsOf(magnitude));
  }
  return FloatOf(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

uint16_t FloatToBFloat16(float value) {
  const uint32_t bits = BitsOf(value);
  if (std::isnan(value))
    return static_cast<uint16_t>((bits >> 16) | 0x40);  // Quiet, so that it cannot round to infinity.
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

uint16_t FloatToHalf(float value) {
  const uint32_t bits = BitsOf(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff));
  if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);  // 65536 and above
  if (magnitude < 0x38800000) {                                              // Below 2^-14: subnormal or zero.
    // Adding 0.5 puts the half's last place at the float's last place, so the hardware rounds to nearest even for us.
    const uint32_t shifted = BitsOf(FloatOf(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (shifted - 0x3f000000));
  }
  const uint32_t rounded = magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | (rounded >> 13));  // 65520 and above carries into infinity, as it should.
}

float LoadAsFloat(DType dtype, const void* data, int64_t index) {
  switch (dtype) {
    case DType::kFloat32: {
      float value;
      std::memcpy(&value, static_cast<const char*>(data) + index * 4, sizeof(value));
      return value;
    }
    case DType::kBFloat16:
      return BFloat16ToFloat(Load16(data, index));
    case DType::kFloat16:
      return HalfToFloat(Load16(data, index));
  }
  return 0.0f;
}

void WidenToFloat(DType dtype, const void* source, int64_t count, float* destination) {
  char* out = reinterpret_cast<char*>(destination);
  for (int64_t i = 0; i < count; ++i) {
    const float value = LoadAsFloat(dtype, source, i);
    std::memcpy(out + i * 4, &value, sizeof(value));
  }
}

void NarrowFromFloat(DType dtype, const float* source, int64_t count, void* destination) {
  char* out = static_cast<char*>(destination);
  if (dtype == DType::kFloat32) {
    if (count > 0) std::memcpy(out, source, static_cast<size_t>(count) * 4);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const float value = LoadAsFloat(DType::kFloat32, source, i);
    const uint16_t bits = dtype == DType::kBFloat16 ? FloatToBFloat16(value) : FloatToHalf(value);
    std::memcpy(out + i * 2, &bits, sizeof(bits));
  }
}

}  // namespace rwkv::kernels
