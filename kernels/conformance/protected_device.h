// A device that proves that nobody takes its memory for the host's.
#pragma once

#include <memory>

#include "kernels/base/device.h"

namespace rwkv::kernels::conformance {

// `device`, which computes on host memory, with its kDevice memory out of the host's reach: touching it is a fault but
// while an operation runs. What reaches beyond a buffer, or into one that is gone, ends the process: operations, copies
// and zeroes. Fresh memory holds NaN, so that nobody lives on zeros nobody wrote.
std::unique_ptr<Device> ProtectDevice(std::unique_ptr<Device> device);

}  // namespace rwkv::kernels::conformance
