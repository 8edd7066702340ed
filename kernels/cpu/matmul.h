// One product as product_kernels.h computes it: products.h with the matrix itself.
#pragma once

#include <cstdint>

#include "kernels/api/products.h"
#include "kernels/base/matrix.h"

namespace rwkv::kernels::cpu {

struct MatmulArgs {
  int64_t rows = 0;             // >= 1
  MatrixView weight;            // [out, in]
  const float* x = nullptr;     // [rows, in]
  const float* bias = nullptr;  // [out], or null
  Activation activation = Activation::kNone;
  const float* gate = nullptr;  // [rows, out], or null
  bool accumulate = false;      // Add to y what else would be stored there.
  float* y = nullptr;           // [rows, out], out
  bool round_inputs = false;    // To bf16, where kernels can and the weights are bf16 (bf16_tiles.h).
  void* prepared = nullptr;     // x as the product wants to read it (prepare_rows)
  bool by_columns = false;      // weight.data lies as columns.h says.
};

// What is asked of memory while something else is computed: so many bytes a step.
struct Ahead {
  const char* data;
  int64_t step;
};

}  // namespace rwkv::kernels::cpu
