#include "kernels/cuda/testing/emulated_cuda.h"

#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/testing/fake_cublaslt.h"
#include "kernels/cuda/testing/fake_runtime.h"

namespace rwkv::kernels::cuda {

bool HasEmulatedDevice() { return true; }

bool IsEmulatedDevice(absl::string_view name) {
  (void)TakeOptions(name);
  return name == kEmulatedDevice;
}

absl::StatusOr<std::unique_ptr<Device>> OpenEmulatedDevice(absl::string_view name, absl::Duration hang_limit) {
  absl::string_view rest = name;
  DeviceOptions options = TakeOptions(rest);
  options.hang_limit = hang_limit;
  options.library = &cublaslt::kFakeCublasLt;
  options.library_rows = kEmulatedLibraryRows;
  return OpenDevice(kFakeRuntime, kEmulatedKernels, 0, name, options);
}

std::vector<std::string> ViolationsOfEmulatedDevice() { return ViolationsOfFake(); }

}  // namespace rwkv::kernels::cuda
