// Rows times a weight matrix, with what follows it:
//   y[t][o] = act(sum_k x[t][k] * weight[o][k] + bias[o]) * gate[t][o]
// without bias and gate where there are none, or y[t][o] += ... with `accumulate` (the residual sum).
// Weights are widened to float exactly, products and sums are float. The order of the sum depends on the number of
// inputs alone: the bits of a row are the same alone, beside any other rows, and at any place among them (law N1).
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/api/products.h"
#include "kernels/base/matrix.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels {

struct MatmulArgs {
  int64_t rows = 0;             // >= 1
  MatrixView weight;            // [out, in]
  const float* x = nullptr;     // [rows, in]
  const float* bias = nullptr;  // [out], or null
  Activation activation = Activation::kNone;
  const float* gate = nullptr;  // [rows, out], or null
  bool accumulate = false;      // Add to y what else would be stored there.
  float* y = nullptr;           // [rows, out], out; may be gate, else overlaps no input
};

// kInvalidArgument: size < 1, null or misaligned pointer, unknown dtype or activation. kResourceExhausted: no memory
// for the stream's workspace. Stateless and thread-safe, but for the stream. Held to reference::Matmul by conformance.
using MatmulOp = absl::Status(const MatmulArgs& args, Stream& stream);

absl::Status Validate(const MatmulArgs& args);

}  // namespace rwkv::kernels
