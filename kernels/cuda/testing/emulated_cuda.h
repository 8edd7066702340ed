// The device "cuda/emulated": the CUDA backend's own kernels and host code, on the emulation and the fake runtime.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "kernels/base/device.h"

namespace rwkv::kernels::cuda {

inline constexpr absl::string_view kEmulatedDevice = "cuda/emulated";

// That name, and those with options behind it: "/fma", "/launches" (cuda_device.h, TakeOptions()).
bool IsEmulatedDevice(absl::string_view name);
inline constexpr absl::string_view kEmulatedFp32Device = "cuda/emulated/fma";
inline constexpr absl::string_view kEmulatedRoundedDevice = "cuda/emulated/rounded";
// Products of a few rows and more by a fake of cuBLASLt. Bits depend on the number of rows.
inline constexpr absl::string_view kEmulatedLibraryDevice = "cuda/emulated/lt";
constexpr int64_t kEmulatedLibraryRows = 4;

// Whether this build has it: it needs CUDA's headers, which come with nvcc.
bool HasEmulatedDevice();

// kUnimplemented: it has not. `hang_limit` as for every GPU.
absl::StatusOr<std::unique_ptr<Device>> OpenEmulatedDevice(absl::string_view name = kEmulatedDevice,
                                                           absl::Duration hang_limit = absl::Seconds(60));

// What was done with it in this process that must not be (fake_runtime.h), in words.
std::vector<std::string> ViolationsOfEmulatedDevice();

}  // namespace rwkv::kernels::cuda
