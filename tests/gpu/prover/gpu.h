// The GPU that is to be proved, or the emulated one when that is rehearsed: the table of the runtime beside the device.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/base/device.h"
#include "kernels/cuda/runtime.h"
#include "kernels/cuda/testing/probes.h"

namespace rwkv::gpu {

struct Gpu {
  const kernels::cuda::Runtime& runtime;
  const kernels::cuda::ProbeSet& probes;
  std::unique_ptr<kernels::Device> device;
  bool is_emulated = false;
};

// "cuda:N", or "cuda/emulated".
absl::StatusOr<Gpu> OpenGpu(const std::string& name);
const kernels::cuda::Runtime& RuntimeOf(absl::string_view name);
bool IsEmulated(absl::string_view name);

// Free memory of the device, in bytes.
absl::StatusOr<int64_t> FreeMemory(const kernels::cuda::Runtime& runtime);

// What nobody may do to a stream is an error at the end of every proof of an emulated GPU.
absl::Status CheckViolations(absl::string_view name);

// Seconds since some moment.
double Now();

}  // namespace rwkv::gpu
