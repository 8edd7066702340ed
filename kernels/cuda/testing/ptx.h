// Kernels as nvcc writes them (PTX), run by the emulation: each thread goes through the instructions one by one, and
// barriers, exchanges, matrix products and what is checked of memory are the emulation's. So what nvcc makes of the
// kernels, and its half of device.cuh with the inline assembler, runs without a GPU. It knows the instructions that
// these kernels have, and no others. What ptxas makes of the text, nobody runs.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/cuda/testing/emulation.h"

namespace rwkv::kernels::cuda::ptx {

struct Entry;  // A kernel.

// The kernels of one text, by name. kUnimplemented: an instruction that is not known, with its line; kInvalidArgument:
// no PTX.
absl::StatusOr<std::map<std::string, std::shared_ptr<const Entry>>> Parse(absl::string_view text);

// The kernel with copies of its arguments, of which there are pointers, as cudaLaunchKernelExC takes them.
emulation::Body Bind(std::shared_ptr<const Entry> entry, void* const* arguments);

}  // namespace rwkv::kernels::cuda::ptx
