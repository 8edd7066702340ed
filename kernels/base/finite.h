// Finding NaN and infinities among weights, states and activations before they spread.
#pragma once

#include <cstdint>

#include "kernels/base/dtype.h"

namespace rwkv::kernels {

// Index of the first of `count` >= 0 elements of `dtype` at `data` that is NaN or infinite, -1 if all are finite.
// `data` may be unaligned. Reads about as fast as memory gives.
int64_t FindNotFinite(DType dtype, const void* data, int64_t count);

}  // namespace rwkv::kernels
