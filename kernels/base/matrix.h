// A weight matrix that somebody else owns (a mapped checkpoint, as a rule).
#pragma once

#include <cstdint>

#include "kernels/base/dtype.h"

namespace rwkv::kernels {

// Row-major without gaps, applied as y = W x: `rows` outputs of `cols` inputs each, as PyTorch stores a Linear.
// (RWKV's low-rank factors are stored [in, out]: whoever loads them transposes them.)
struct MatrixView {
  DType dtype = DType::kFloat32;
  int64_t rows = 0;            // outputs
  int64_t cols = 0;            // inputs
  const void* data = nullptr;  // rows * cols elements, aligned to one element (not more)
};

inline int64_t SizeInBytes(const MatrixView& matrix) { return matrix.rows * matrix.cols * SizeOf(matrix.dtype); }

}  // namespace rwkv::kernels
