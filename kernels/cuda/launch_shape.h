// How large a launch is.
#pragma once

#include <cstdint>

// What cudaStream_t points to: the handle is this pointer, without CUDA's headers.
struct CUstream_st;

namespace rwkv::kernels::cuda {

using StreamHandle = CUstream_st*;

struct LaunchShape {
  uint32_t grid_x = 1;
  uint32_t grid_y = 1;
  uint32_t threads = 0;       // of a block: whole warps
  uint32_t shared_bytes = 0;  // of a block
};

}  // namespace rwkv::kernels::cuda
