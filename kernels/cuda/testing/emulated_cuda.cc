#include "kernels/cuda/testing/emulated_cuda.h"

#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/testing/fake_runtime.h"

namespace rwkv::kernels::cuda {

bool HasEmulatedDevice() { return true; }

absl::StatusOr<std::unique_ptr<Device>> OpenEmulatedDevice(absl::Duration hang_limit) {
  return OpenDevice(kFakeRuntime, kEmulatedKernels, 0, kEmulatedDevice, hang_limit);
}

std::vector<std::string> ViolationsOfEmulatedDevice() { return ViolationsOfFake(); }

}  // namespace rwkv::kernels::cuda
