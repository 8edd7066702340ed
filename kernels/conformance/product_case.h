// A case of the product: sizes, storage and epilogue, from which the operation's case and its formula follow.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/api/products.h"
#include "kernels/base/dtype.h"
#include "kernels/base/weight.h"
#include "kernels/conformance/conformance.h"
#include "kernels/conformance/device_memory.h"
#include "kernels/conformance/op_suite.h"

namespace rwkv::kernels::conformance {

struct ProductCase {
  std::string name;
  int64_t rows = 5;
  int64_t inputs = 64;
  int64_t outputs = 12;
  Storage storage = {"bf16", DType::kBFloat16};
  Activation activation = Activation::kNone;
  bool bias = false;
  bool gate = false;
  bool in_place = false;  // y is the gate
  bool accumulate = false;
  DType inputs_of = DType::kFloat32;  // Inputs are numbers of this type.
  float zeros = 0.0f;  // So many of the inputs are zero, of each group or of all but a few; the weight is for such.
};

OpCase MakeProductCase(const ProductCase& c);

// The nearest of the type, ties to even.
Floats RoundTo(DType dtype, Floats x);

// One product, alone; fails the test where the device fails.
Floats Multiply(DeviceMemory& memory, const Weight* weight, int64_t rows, const Floats& x,
                Activation activation = Activation::kNone);

}  // namespace rwkv::kernels::conformance
