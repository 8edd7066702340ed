#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "tests/gpu/prover/gpu.h"
#include "tests/gpu/prover/proofs.h"

namespace rwkv::gpu {
namespace {

using kernels::MemoryKind;
using kernels::cuda::kProbeOutputs;
using kernels::cuda::kProbeThreads;
using kernels::cuda::Probe;
using Floats = kernels::DeviceArray<float>;

const char* const kNames[kernels::cuda::kProbes] = {
    "arithmetic", "half",   "math",   "doubles",         "shuffle",         "sums",
    "wide",       "shared", "matrix", "matrix_of_bytes", "matrix_of_reals", "matrix_of_halves"};

absl::StatusOr<std::vector<float>> Run(const Gpu& gpu, Probe probe, const std::vector<float>& in) {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<kernels::Stream> stream, gpu.device->NewStream());
  const auto count = static_cast<int64_t>(in.size());
  RWKV_ASSIGN_OR_RETURN(const Floats pinned_in, Floats::Create(*gpu.device, count, MemoryKind::kPinned));
  RWKV_ASSIGN_OR_RETURN(const Floats pinned_out,
                        Floats::Create(*gpu.device, count * kProbeOutputs, MemoryKind::kPinned));
  RWKV_ASSIGN_OR_RETURN(const Floats device_in, Floats::Create(*gpu.device, count));
  RWKV_ASSIGN_OR_RETURN(const Floats device_out, Floats::Create(*gpu.device, count * kProbeOutputs));
  std::memcpy(pinned_in.data(), in.data(), in.size() * sizeof(float));
  RWKV_RETURN_IF_ERROR(stream->Copy(device_in.data(), pinned_in.data(), device_in.size_in_bytes()));
  const int error =
      gpu.probes.probe(probe, device_in.data(), device_out.data(), static_cast<int>(count / kProbeThreads),
                       static_cast<kernels::cuda::StreamHandle>(stream->handle()));
  if (error != 0) return absl::InternalError(absl::StrCat("probe: CUDA's error ", error));
  RWKV_RETURN_IF_ERROR(stream->Copy(pinned_out.data(), device_out.data(), device_out.size_in_bytes()));
  RWKV_RETURN_IF_ERROR(stream->Synchronize());
  return std::vector<float>(pinned_out.data(), pinned_out.data() + pinned_out.size());
}

// Any bits, and numbers of moderate size; for matrices only these.
std::vector<float> Inputs(Probe probe, int blocks) {
  std::mt19937 random(static_cast<uint32_t>(probe) + 1);
  std::vector<float> in(static_cast<size_t>(blocks) * kProbeThreads);
  const bool whole_words = probe == Probe::kArithmetic || probe == Probe::kHalf || probe == Probe::kMath;
  for (size_t i = 0; i < in.size(); ++i) {
    if (probe == Probe::kHalf && i < 32768) {  // Every half.
      const auto bits = static_cast<uint32_t>(2 * i) | static_cast<uint32_t>(2 * i + 1) << 16;
      std::memcpy(&in[i], &bits, sizeof(bits));
      continue;
    }
    if (whole_words && i % 2 == 1) {
      const auto bits = static_cast<uint32_t>(random());
      std::memcpy(&in[i], &bits, sizeof(bits));
      continue;
    }
    in[i] = static_cast<float>(random() >> 8) * 0x1p-20f - 8.0f;
  }
  return in;
}

bool Same(float a, float b) { return std::memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b)); }

}  // namespace

absl::Status Probes(const std::string& name) {
  RWKV_ASSIGN_OR_RETURN(const Gpu gpu, OpenGpu(name));
  RWKV_ASSIGN_OR_RETURN(const Gpu emulation, OpenGpu(std::string(kernels::cuda::kEmulatedDevice)));
  std::string wrong;
  for (int p = 0; p < kernels::cuda::kProbes; ++p) {
    const auto probe = static_cast<Probe>(p);
    const std::vector<float> in = Inputs(probe, 130);
    RWKV_ASSIGN_OR_RETURN(const std::vector<float> got, Run(gpu, probe, in));
    RWKV_ASSIGN_OR_RETURN(const std::vector<float> expected, Run(emulation, probe, in));
    size_t others = 0;
    size_t first = 0;
    double furthest = 0;
    for (size_t i = got.size(); i-- > 0;) {
      if (Same(got[i], expected[i])) continue;
      ++others;
      first = i;
      furthest = std::max(furthest, std::abs(static_cast<double>(got[i]) - static_cast<double>(expected[i])));
    }
    std::cout << absl::StrFormat("{\"probe\": \"%s\", \"values\": %d, \"other_bits\": %d, \"furthest\": %g}", kNames[p],
                                 got.size(), others, furthest)
              << std::endl;
    // The order of a tensor core's sums is its own: 32 products of numbers below 8, and roundings of partial sums.
    const bool right = probe == Probe::kMatrixOfReals ? furthest <= 32 * 64 * 0x1p-20 : others == 0;
    if (right || !wrong.empty()) continue;
    wrong =
        absl::StrFormat("%s: output %d of thread %d gives %a, the emulation %a; %d of %d have other bits", kNames[p],
                        first % kProbeOutputs, first / kProbeOutputs, got[first], expected[first], others, got.size());
  }
  return wrong.empty() ? absl::OkStatus() : absl::InternalError(wrong);
}

}  // namespace rwkv::gpu
