// Weights to the codes of a quantized matrix (matrix.h), as a converter needs it. Per group of neighbours in a row:
//   kInt8: scale = max |w| / 127                              code = round(w / scale)
//   kInt4: minimum = min w,  scale = (max w - minimum) / 15   code = round((w - minimum) / scale)
// The scale is the next fp16 upwards and the minimum the next one downwards, so that no code is cut off.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/base/matrix.h"

namespace rwkv::kernels {

// Quantizes one row of `count` >= 1 weights. `codes` gets the row's bytes, `scales` and (kInt4 only, else null)
// `minimums` one fp16 a group, as in MatrixView. kInvalidArgument: `quantization` is neither kInt8 nor kInt4, `group`
// is neither 32 nor 64, a weight is not finite or too large for an fp16 scale or minimum (`codes` are undefined then).
absl::Status QuantizeRow(Quantization quantization, int64_t group, const float* weights, int64_t count, uint8_t* codes,
                         uint16_t* scales, uint16_t* minimums);

// What a weight at most differs by from the one that comes back: half a step, and the rounding of that to a float,
//   |w - (code * scale + minimum)| <= scale / 2 + 2^-23 (|w| + scale).
double QuantizationErrorBound(float weight, uint16_t scale);

}  // namespace rwkv::kernels
