// nvcc's build of the kernels on the emulation: what it launches runs as the PTX that nvcc wrote (ptx.h). A program
// that links this has no way to a GPU: launches come here by the linker's --wrap. Link kDeviceKernels or kDeviceProbes
// with it, and give it their PTX before the first launch.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"

namespace rwkv::kernels::cuda {

// The kernels of these files. kUnimplemented: one has an instruction that is not known.
absl::Status LoadPtx(const std::vector<std::string>& paths);

// Names, as nvcc writes them, of the kernels that were launched so far.
std::vector<std::string> KernelsLaunchedAsPtx();

// Kernels that LoadPtx() has read.
std::vector<std::string> KernelsOfPtx();

}  // namespace rwkv::kernels::cuda
