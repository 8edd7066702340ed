#include "kernels/cpu/emulated_amx.h"

#include "absl/status/status.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/kernel_set.h"

namespace rwkv::kernels::cpu {

#if defined(__x86_64__)
bool HasEmulatedAmx() {
  for (const Backend& backend : Backends()) {
    if (backend.kernels == &kAvx512VnniKernels) return backend.runs_here;
  }
  return false;
}

absl::StatusOr<std::unique_ptr<Device>> OpenEmulatedAmx(absl::string_view name) {
  if (!HasEmulatedAmx()) return absl::UnimplementedError("this processor has no AVX-512 VNNI");
  if (name == kEmulatedAmxDevice) return OpenDevice({kEmulatedAmxDevice, "cpu/amx", &kEmulatedAmxKernels, true}, 0);
  return OpenDevice({kEmulatedAmxBf16Device, "cpu/amx/bf16", &kEmulatedAmxKernels, true, true}, 0);
}
#else
bool HasEmulatedAmx() { return false; }

absl::StatusOr<std::unique_ptr<Device>> OpenEmulatedAmx(absl::string_view) {
  return absl::UnimplementedError("AMX is not of this architecture");
}
#endif

}  // namespace rwkv::kernels::cpu
