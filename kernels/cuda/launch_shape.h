// How large a launch is, and where it goes.
#pragma once

#include <cstdint>

// What cudaStream_t points to: the handle is this pointer, without CUDA's headers.
struct CUstream_st;

namespace rwkv::kernels::cuda {

using StreamHandle = CUstream_st*;

// A stream, and whether a kernel's blocks may begin there while the kernel before still ends (programmatic dependent
// launch, compute capability 9.0).
struct LaunchStream {
  LaunchStream(StreamHandle stream, bool may_overlap = false)  // NOLINT: a handle is one.
      : handle(stream), overlaps(may_overlap) {}

  StreamHandle handle;
  bool overlaps;
};

struct LaunchShape {
  uint32_t grid_x = 1;
  uint32_t grid_y = 1;
  uint32_t threads = 0;       // of a block: whole warps
  uint32_t shared_bytes = 0;  // of a block
};

}  // namespace rwkv::kernels::cuda
