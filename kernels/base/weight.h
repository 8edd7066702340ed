// A weight matrix as one device computes with it.
#pragma once

#include <cstdint>

#include "kernels/base/buffer.h"
#include "kernels/base/matrix.h"

namespace rwkv::kernels {

// What the operations do with a matrix, so that a device knows what to make of it.
enum class WeightUse : uint8_t {
  kProduct,        // Inputs are multiplied with all of it (products.h).
  kSparseProduct,  // The same, and most inputs are zero, as behind a squared ReLU.
  kRows,           // Single rows are looked up by token (embed.h).
};

// What Device::Load() made of a file's matrix. Its sizes and how it is stored are anybody's to read; the bytes that
// `matrix` points to are where the device's operations find them: the file itself, or an upload.
struct Weight {
  MatrixView matrix;
  // What the device packed beside it or uploaded, in a layout that is its own affair; empty if it needed nothing.
  Buffer packed;
};

}  // namespace rwkv::kernels
