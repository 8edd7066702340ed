// Opens the device that a process computes on, once, at start.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/base/device.h"

namespace rwkv::kernels {

// `request` is "auto" or "cpu" (the fastest instruction set of this processor), or a device's name: "cpu/avx512",
// "cpu/avx2", "cpu/portable", "reference". Thread-safe.
// kInvalidArgument: no such device (the message lists them). kUnimplemented: this machine or build cannot run it.
absl::StatusOr<std::unique_ptr<Device>> OpenDevice(absl::string_view request);

// The names of all devices that this machine can open, the plain reference first, the fastest last.
std::vector<std::string> AvailableDevices();

}  // namespace rwkv::kernels
