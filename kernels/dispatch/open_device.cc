#include "kernels/dispatch/open_device.h"

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cuda/cuda.h"
#include "kernels/reference/reference.h"

namespace rwkv::kernels {

namespace {

std::string FastestCpu() {
  std::string name;
  for (const cpu::Backend& backend : cpu::Backends()) {
    if (backend.runs_here && !backend.rounds_inputs) name = std::string(backend.name);
  }
  return name;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Device>> OpenDevice(absl::string_view request, int threads) {
  const std::string asked(request);
  if (request == "reference") return reference::OpenDevice();
  std::vector<std::string> names = {"auto", "reference", "cpu"};
  for (const cpu::Backend& backend : cpu::Backends()) {
    names.emplace_back(backend.name);
    if (names.back() != request) continue;
    if (backend.runs_here) return cpu::OpenDevice(backend, threads);
    return absl::UnimplementedError(absl::StrCat("device \"", request, "\" cannot run on this processor"));
  }
  names.emplace_back("cuda:<number>");
  if (absl::StartsWith(request, "cuda:")) {
    absl::StatusOr<std::unique_ptr<Device>> device = cuda::OpenDevice(request);
    if (!absl::IsInvalidArgument(device.status())) return device;
  }
  if (asked == "auto" && cuda::CountDevices() > 0) return cuda::OpenDevice("cuda:0");
  if (asked == "auto" || asked == "cpu") return OpenDevice(FastestCpu(), threads);
  return absl::InvalidArgumentError(absl::StrCat("device \"", asked, "\" is none of ", absl::StrJoin(names, ", ")));
}

std::string WhyNoGpu() {
  if (cuda::CountDevices() > 0) return "";
  return std::string(cuda::OpenDevice("cuda:0").status().message());
}

std::vector<std::string> AvailableDevices() {
  std::vector<std::string> names = {"reference"};
  for (const cpu::Backend& backend : cpu::Backends()) {
    if (backend.runs_here && !backend.rounds_inputs) names.emplace_back(backend.name);
  }
  for (int ordinal = 0; ordinal < cuda::CountDevices(); ++ordinal) names.push_back(absl::StrCat("cuda:", ordinal));
  return names;
}

}  // namespace rwkv::kernels
