#include "absl/status/status.h"
#include "kernels/cuda/testing/emulated_cuda.h"

namespace rwkv::kernels::cuda {

bool HasEmulatedDevice() { return false; }
bool IsEmulatedDevice(absl::string_view name) { return name == kEmulatedDevice; }

absl::StatusOr<std::unique_ptr<Device>> OpenEmulatedDevice(absl::string_view, absl::Duration) {
  return absl::UnimplementedError("cuda/emulated: this build has no CUDA headers (nvcc was not found)");
}

std::vector<std::string> ViolationsOfEmulatedDevice() { return {}; }

}  // namespace rwkv::kernels::cuda
