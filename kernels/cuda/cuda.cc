#include "kernels/cuda/cuda.h"

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

#if RWKV_HAVE_CUDA
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/runtime.h"
#endif

namespace rwkv::kernels::cuda {
namespace {

absl::Status NoName(absl::string_view name) {
  return absl::InvalidArgumentError(
      absl::StrCat("device \"", name, "\" is not cuda:<number>[/half][/serial][/fma|/rounded|/lt][/launches]"));
}

}  // namespace

#if RWKV_HAVE_CUDA

absl::StatusOr<std::unique_ptr<Device>> OpenDevice(absl::string_view name) {
  absl::string_view rest = name;
  const DeviceOptions options = TakeOptions(rest);
  int ordinal = 0;
  if (!absl::ConsumePrefix(&rest, "cuda:") || !absl::SimpleAtoi(rest, &ordinal)) return NoName(name);
  return OpenDevice(kCudaRuntime, kDeviceKernels, ordinal, name, options);
}

int CountDevices() {
  int count = 0;
  return kCudaRuntime.get_device_count(&count) == cudaSuccess ? count : 0;
}

#else

absl::StatusOr<std::unique_ptr<Device>> OpenDevice(absl::string_view name) {
  absl::string_view rest = name;
  if (!absl::ConsumePrefix(&rest, "cuda:") || rest.empty() || !absl::ascii_isdigit(rest[0])) return NoName(name);
  return absl::UnimplementedError(absl::StrCat(name, ": this build has no CUDA (nvcc was not found)"));
}

int CountDevices() { return 0; }

#endif

}  // namespace rwkv::kernels::cuda
