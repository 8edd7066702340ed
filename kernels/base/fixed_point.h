// Products with weights of few bits are sums of whole numbers: the row's inputs become 16-bit fixed point, group by
// group, so that a group's sum is exact and its order free. Every device gives the same bits (products.h).
//
// Of a group x[0 .. n) of inputs, with m = max |x[k]|:
//   scale = m / 32512      q[k] = x[k] * (32512 / m), rounded to even       x[k] = q[k] * scale within scale / 2
// q and scale are 0 where m < 2^-100; where m is no finite number, q is 0 and scale is NaN, and so is what is computed.
// 32512 = 127 * 256, so that the number is two signed bytes. It is 1/90 to 1/270 of what rounding weights to int8 costs.
#pragma once

#include <cstdint>

#include "kernels/base/matrix.h"

namespace rwkv::kernels {

constexpr float kLargestFixedPoint = 32512.0f;
constexpr float kSmallestFixedPointMaximum = 0x1p-100f;

// Inputs of a group, where products with the matrix are computed in fixed point (int8, int4, Q8_0, Q4_0); else 0.
int64_t FixedPointGroup(const MatrixView& matrix);

// One group, `count` >= 1, the plain way; returns the scale.
float ToFixedPoint(const float* x, int64_t count, int16_t* q);

}  // namespace rwkv::kernels
