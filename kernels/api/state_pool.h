// Where the slots of a state pool keep one tensor of their state.
#pragma once

#include <cstdint>

namespace rwkv::kernels {

// Slot s has the tensor's floats from data + s * stride. For operations with more than one state tensor.
struct StatePool {
  float* data = nullptr;
  int64_t stride = 0;  // floats, at least one slot's
};

}  // namespace rwkv::kernels
