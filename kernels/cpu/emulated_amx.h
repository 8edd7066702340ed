// For tests: the backends cpu/amx and cpu/amx/bf16 with their tiles in plain code, on any processor that has AVX-512
// VNNI.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/base/device.h"

namespace rwkv::kernels::cpu {

constexpr absl::string_view kEmulatedAmxDevice = "cpu/amx/emulated";
constexpr absl::string_view kEmulatedAmxBf16Device = "cpu/amx/bf16/emulated";

// Whether this processor has what the rest of those backends needs.
bool HasEmulatedAmx();

// `name`: one of the above. kUnimplemented: this processor has not what it takes.
absl::StatusOr<std::unique_ptr<Device>> OpenEmulatedAmx(absl::string_view name);

}  // namespace rwkv::kernels::cpu
