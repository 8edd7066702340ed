// Products of the step's rows and weight matrices, with what follows each:
//   y[t][o] = act(sum_k x[t][k] * weight[o][k] + bias[o]) * gate[t][o]
// without bias and gate where there are none, or y[t][o] += ... with `accumulate` (the residual sum).
// Weights are widened to float exactly, products and sums are float. The order of the sum depends on the number of
// inputs alone.
// Where FixedPointGroup() says so (int8, int4, Q8_0, Q4_0), a weight is code * scale + minimum, a group of them shares
// scale and minimum, and the inputs become fixed point by the same groups, x = q * s (kernels/base/fixed_point.h):
//   sum = sum + (float(sum of code * q) * s) * scale, and then, with minimums, sum + (float(sum of q) * s) * minimum
// group by group from zero; the inner sums are exact, every other operation is rounded. So these sums are the same bits
// on every device that has IEEE floats, which the reference shows.
// In both cases: the bits of a row are the same alone, beside any other rows, and at any place among them (law N1).
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/base/stream.h"
#include "kernels/base/weight.h"

namespace rwkv::kernels {

enum class Activation : uint8_t {
  kNone = 0,
  kSigmoid = 1,  // 1 / (1 + exp(-z))
  kTanh = 2,
  kSquaredRelu = 3,  // max(z, 0)^2
  kSilu = 4,         // z / (1 + exp(-z)), the gate of RWKV-5 and 6
  kDecay = 5,        // exp(-exp(z)), the decay of RWKV-6
};

struct Product {
  const Weight* weight = nullptr;  // [out, in], loaded by the device for kProduct or kSparseProduct
  const float* x = nullptr;        // [rows, in]
  const float* bias = nullptr;     // [out], or null
  Activation activation = Activation::kNone;
  const float* gate = nullptr;  // [rows, out], or null
  bool accumulate = false;      // Add to y what else would be stored there.
  float* y = nullptr;           // [rows, out], out; may be gate, else overlaps nothing of any product of the call
};

// Products of the same rows. None reads what another writes, so that a device may compute them in any order or at once.
struct ProductsArgs {
  int64_t rows = 0;                   // >= 1
  const Product* products = nullptr;  // [count], read before the call returns
  int64_t count = 0;                  // >= 1
};

// kInvalidArgument: size < 1, null or misaligned pointer, unknown activation. kResourceExhausted: no memory for the
// stream's scratch memory. Stateless and thread-safe, but for the stream. Held to reference::Products by conformance.
using ProductsOp = absl::Status(const ProductsArgs& args, Stream& stream);

absl::Status Validate(const ProductsArgs& args);

}  // namespace rwkv::kernels
