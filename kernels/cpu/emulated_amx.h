// For tests: the backend cpu/amx with its tiles in plain code, on any processor that has AVX-512 VNNI.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/base/device.h"

namespace rwkv::kernels::cpu {

constexpr absl::string_view kEmulatedAmxDevice = "cpu/amx/emulated";

// Whether this processor has what the rest of that backend needs.
bool HasEmulatedAmx();

// kUnimplemented: it has not.
absl::StatusOr<std::unique_ptr<Device>> OpenEmulatedAmx();

}  // namespace rwkv::kernels::cpu
