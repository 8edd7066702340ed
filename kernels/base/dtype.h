// Element types of weights, and their exact widening to float. Activations and states are always float.
#pragma once

#include <cstdint>

#include "absl/strings/string_view.h"

namespace rwkv::kernels {

enum class DType : uint8_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Bytes of one element.
int64_t SizeOf(DType dtype);

// "fp32", "bf16", "fp16".
absl::string_view Name(DType dtype);

// Widening is exact, NaN payloads and subnormals included (a signalling NaN becomes quiet in HalfToFloat only).
float BFloat16ToFloat(uint16_t bits);
float HalfToFloat(uint16_t bits);

// Narrowing rounds to nearest, ties to even; too large becomes infinity; NaN stays NaN.
uint16_t FloatToBFloat16(float value);
uint16_t FloatToHalf(float value);

// Element `index` of an array of `dtype`; `data` may be unaligned.
float LoadAsFloat(DType dtype, const void* data, int64_t index);

// `count` elements of an array of `dtype` at `source` to or from floats; the arrays must not overlap, both may be
// unaligned.
void WidenToFloat(DType dtype, const void* source, int64_t count, float* destination);
void NarrowFromFloat(DType dtype, const float* source, int64_t count, void* destination);

}  // namespace rwkv::kernels
