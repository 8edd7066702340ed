#include "kernels/dispatch/open_device.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/cpu/cpu.h"
#include "kernels/reference/reference.h"

namespace rwkv::kernels {

absl::StatusOr<std::unique_ptr<Device>> OpenDevice(absl::string_view request, int threads) {
  if (request == "reference") return reference::OpenDevice();
  std::vector<std::string> names = {"auto", "reference", "cpu"};
  for (const cpu::Backend& backend : cpu::Backends()) {
    names.emplace_back(backend.name);
    if (names.back() != request) continue;
    if (backend.runs_here) return cpu::OpenDevice(backend, threads);
    return absl::UnimplementedError(absl::StrCat("device \"", request, "\" cannot run on this processor"));
  }
  if (request == "auto" || request == "cpu") return OpenDevice(AvailableDevices().back(), threads);
  return absl::InvalidArgumentError(absl::StrCat("device \"", request, "\" is none of ", absl::StrJoin(names, ", ")));
}

std::vector<std::string> AvailableDevices() {
  std::vector<std::string> names = {"reference"};
  for (const cpu::Backend& backend : cpu::Backends()) {
    if (backend.runs_here) names.emplace_back(backend.name);
  }
  return names;
}

}  // namespace rwkv::kernels
