// The GPUs of this machine, if this build can use them.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/base/device.h"

namespace rwkv::kernels::cuda {

// "cuda:<ordinal>", and behind it what cuda_device.h's TakeOptions() takes: "cuda:0/fma/launches". kInvalidArgument: it
// is no such name. kUnimplemented: built without nvcc, no driver, no such device, or too old a one; says which.
absl::StatusOr<std::unique_ptr<Device>> OpenDevice(absl::string_view name);

// 0 where there is no driver or this build knows no CUDA.
int CountDevices();

}  // namespace rwkv::kernels::cuda
