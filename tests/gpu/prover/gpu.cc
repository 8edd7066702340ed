#include "tests/gpu/prover/gpu.h"

#include <chrono>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/cuda/testing/fake_runtime.h"
#include "kernels/dispatch/open_device.h"

namespace rwkv::gpu {

using kernels::cuda::Runtime;

bool IsEmulated(absl::string_view name) { return kernels::cuda::IsEmulatedDevice(name); }

const Runtime& RuntimeOf(absl::string_view name) {
  return IsEmulated(name) ? kernels::cuda::kFakeRuntime : kernels::cuda::kCudaRuntime;
}

absl::StatusOr<Gpu> OpenGpu(const std::string& name) {
  const bool is_emulated = IsEmulated(name);
  if (!is_emulated && !absl::StartsWith(name, "cuda:")) {
    return absl::InvalidArgumentError(absl::StrCat("device \"", name, "\" is none of cuda:<number>, cuda/emulated"));
  }
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<kernels::Device> device,
                        is_emulated ? kernels::cuda::OpenEmulatedDevice(name) : kernels::OpenDevice(name));
  RWKV_RETURN_IF_ERROR(device->MakeCurrent());
  const kernels::cuda::ProbeSet& probes = is_emulated ? kernels::cuda::kEmulatedProbes : kernels::cuda::kDeviceProbes;
  return Gpu{RuntimeOf(name), probes, std::move(device), is_emulated};
}

absl::StatusOr<int64_t> FreeMemory(const Runtime& runtime) {
  size_t free = 0;
  size_t total = 0;
  RWKV_RETURN_IF_ERROR(ToStatus(runtime, runtime.mem_get_info(&free, &total), "free memory"));
  return static_cast<int64_t>(free);
}

absl::Status CheckViolations(absl::string_view name) {
  if (!IsEmulated(name)) return absl::OkStatus();
  const std::vector<std::string> violations = kernels::cuda::ViolationsOfFake();
  if (violations.empty()) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("the fake saw: ", absl::StrJoin(violations, "; ")));
}

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace rwkv::gpu
