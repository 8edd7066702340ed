// Where the slots of a state pool keep one tensor of their state: how every operation with a state is given it.
#pragma once

#include <cstdint>

namespace rwkv::kernels {

// Device memory. Slot s has the tensor's floats from data + s * stride.
struct StateTensor {
  float* data = nullptr;
  int64_t stride = 0;  // floats, at least one slot's
  // Of wkv states on devices that store them so (OpTable::cast_state): both are of fp16 numbers, not floats.
  bool is_half = false;

  float* of(int32_t slot) const { return data + slot * stride; }
  uint16_t* halves_of(int32_t slot) const { return reinterpret_cast<uint16_t*>(data) + slot * stride; }
};

}  // namespace rwkv::kernels
