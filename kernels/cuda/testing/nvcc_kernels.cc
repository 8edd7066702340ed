#include "kernels/cuda/testing/nvcc_kernels.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/testing/emulation.h"
#include "kernels/cuda/testing/ptx.h"

namespace rwkv::kernels::cuda {
namespace {

struct Kernels {
  absl::Mutex mu;
  std::map<const void*, std::string> names;  // By what the host's code has for a kernel.
  std::map<std::string, std::shared_ptr<const ptx::Entry>> entries;
  std::set<std::string> launched;
};

Kernels& TheKernels() {
  static auto* const kernels = new Kernels;
  return *kernels;
}

cudaError_t Launch(const cudaLaunchConfig_t& config, const void* function, void* const* arguments) {
  Kernels& kernels = TheKernels();
  std::shared_ptr<const ptx::Entry> entry;
  std::string name;
  {
    absl::MutexLock lock(&kernels.mu);
    name = kernels.names[function];
    const auto it = kernels.entries.find(name);
    if (it == kernels.entries.end()) {
      std::fprintf(stderr, "no PTX of the kernel \"%s\"\n", name.c_str());
      std::abort();
    }
    entry = it->second;
    kernels.launched.insert(name);
  }
  bool overlaps = false;
  for (unsigned int i = 0; i < config.numAttrs; ++i) {
    overlaps |= config.attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                config.attrs[i].val.programmaticStreamSerializationAllowed == 1;
  }
  const LaunchShape shape = {config.gridDim.x, config.gridDim.y, config.blockDim.x,
                             static_cast<uint32_t>(config.dynamicSmemBytes)};
  return static_cast<cudaError_t>(emulation::Submit(LaunchStream(config.stream, overlaps), shape, name.c_str(),
                                                    ptx::Bind(std::move(entry), arguments)));
}

}  // namespace

absl::Status LoadPtx(const std::vector<std::string>& paths) {
  Kernels& kernels = TheKernels();
  for (const std::string& path : paths) {
    std::ifstream file(path);
    std::stringstream text;
    text << file.rdbuf();
    if (!file) return absl::NotFoundError(path);
    auto entries = ptx::Parse(text.str());
    if (!entries.ok())
      return absl::Status(entries.status().code(), absl::StrCat(path, ": ", entries.status().message()));
    absl::MutexLock lock(&kernels.mu);
    kernels.entries.insert(entries->begin(), entries->end());
  }
  return absl::OkStatus();
}

std::vector<std::string> KernelsLaunchedAsPtx() {
  Kernels& kernels = TheKernels();
  absl::MutexLock lock(&kernels.mu);
  return {kernels.launched.begin(), kernels.launched.end()};
}

std::vector<std::string> KernelsOfPtx() {
  Kernels& kernels = TheKernels();
  absl::MutexLock lock(&kernels.mu);
  std::vector<std::string> names;
  for (const auto& [name, entry] : kernels.entries) names.push_back(name);
  return names;
}

}  // namespace rwkv::kernels::cuda

// In place of CUDA's own, by the linker's --wrap. What nvcc's code says of its kernels as the program starts.
extern "C" void __wrap___cudaRegisterFunction(void**, const char* host_function, char*, const char* device_name, int,
                                              void*, void*, void*, void*, int*) {
  auto& kernels = rwkv::kernels::cuda::TheKernels();
  absl::MutexLock lock(&kernels.mu);
  kernels.names[host_function] = device_name;
}

extern "C" cudaError_t __wrap_cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                                  void** arguments) {
  return rwkv::kernels::cuda::Launch(*config, function, arguments);
}
