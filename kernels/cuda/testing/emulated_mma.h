// The matrix products of tensor cores, for the emulation: device.cuh says which lane has what.
#pragma once

#include <cstdint>

namespace rwkv::kernels::cuda::emulation {

constexpr int kMmaLanes = 32;

// What the lanes of a warp bring.
struct MmaLanes {
  struct Lane {
    void* c;  // [4] of float or int32_t, in and out
    const uint32_t* a;
    const uint32_t* b;
  };
  Lane lanes[kMmaLanes];
};

// `steps` products one after the other, of 16 inputs each: a is [steps][4], b [steps][2]. Sums are float, by input.
void MultiplyBf16(const MmaLanes& warp, int steps);
void MultiplyHalf(const MmaLanes& warp, int steps);

// One product, of 32 inputs: a is [4], b [2].
void MultiplyInt8(const MmaLanes& warp);

}  // namespace rwkv::kernels::cuda::emulation
