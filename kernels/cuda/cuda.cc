#include "kernels/cuda/cuda.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

#if RWKV_HAVE_CUDA
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/runtime.h"
#endif

namespace rwkv::kernels::cuda {

#if RWKV_HAVE_CUDA

absl::StatusOr<std::unique_ptr<Device>> OpenDevice(int ordinal) {
  return OpenDevice(kCudaRuntime, kDeviceKernels, ordinal, absl::StrCat("cuda:", ordinal));
}

int CountDevices() {
  int count = 0;
  return kCudaRuntime.get_device_count(&count) == cudaSuccess ? count : 0;
}

#else

absl::StatusOr<std::unique_ptr<Device>> OpenDevice(int ordinal) {
  return absl::UnimplementedError(absl::StrCat("cuda:", ordinal, ": this build has no CUDA (nvcc was not found)"));
}

int CountDevices() { return 0; }

#endif

}  // namespace rwkv::kernels::cuda
