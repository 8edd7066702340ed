#include <algorithm>
#include <cstdint>
#include <iostream>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/status_macros.h"
#include "tests/gpu/prover/gpu.h"
#include "tests/gpu/prover/proofs.h"

namespace rwkv::gpu {
namespace {

constexpr int kRepeats = 20;

// The best of three: seconds of one `work`, which is enqueued kRepeats times at once.
absl::StatusOr<double> Seconds(kernels::Stream& stream, absl::FunctionRef<absl::Status()> work) {
  double best = 1e9;
  for (int i = 0; i < 4; ++i) {  // The first does not count.
    const double begin = Now();
    for (int r = 0; r < kRepeats; ++r) RWKV_RETURN_IF_ERROR(work());
    RWKV_RETURN_IF_ERROR(stream.Synchronize());
    if (i > 0) best = std::min(best, (Now() - begin) / kRepeats);
  }
  return best;
}

}  // namespace

absl::Status Rates(const std::string& name) {
  RWKV_ASSIGN_OR_RETURN(const Gpu gpu, OpenGpu(name));
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<kernels::Stream> stream, gpu.device->NewStream());

  const int64_t bytes = gpu.is_emulated ? 1 << 20 : int64_t{1} << 31;
  RWKV_ASSIGN_OR_RETURN(const kernels::Buffer from, gpu.device->Allocate(bytes, kernels::MemoryKind::kDevice));
  RWKV_ASSIGN_OR_RETURN(const kernels::Buffer to, gpu.device->Allocate(bytes, kernels::MemoryKind::kDevice));
  RWKV_RETURN_IF_ERROR(stream->Zero(from.data(), bytes));
  RWKV_ASSIGN_OR_RETURN(const double copy,
                        Seconds(*stream, [&] { return stream->Copy(to.data(), from.data(), bytes); }));

  // As many warps as any device keeps, for some milliseconds.
  const int blocks = gpu.is_emulated ? 2 : 132 * 8;
  const int rounds = gpu.is_emulated ? 4 : 4096;
  RWKV_ASSIGN_OR_RETURN(const auto out, kernels::DeviceArray<float>::Create(*gpu.device, blocks));
  RWKV_ASSIGN_OR_RETURN(const auto sums,
                        kernels::DeviceArray<float>::Create(*gpu.device, blocks, kernels::MemoryKind::kPinned));
  const auto multiply = [&]() -> absl::Status {
    const int error =
        gpu.probes.matrix_rate(out.data(), blocks, rounds, static_cast<kernels::cuda::StreamHandle>(stream->handle()));
    return error == 0 ? absl::OkStatus() : absl::InternalError(absl::StrCat("matrix_rate: CUDA's error ", error));
  };
  RWKV_ASSIGN_OR_RETURN(const double matrix, Seconds(*stream, multiply));
  RWKV_RETURN_IF_ERROR(stream->Copy(sums.data(), out.data(), out.size_in_bytes()));
  RWKV_RETURN_IF_ERROR(stream->Synchronize());
  for (int block = 0; block < blocks; ++block) {
    if (sums.data()[block] == 128.0f * static_cast<float>(rounds)) continue;
    return absl::InternalError(
        absl::StrFormat("matrix_rate: block %d gives %g, not %d", block, sums.data()[block], 128 * rounds));
  }
  const double flop = 4096.0 * 8 * rounds * blocks * (kernels::cuda::kProbeThreads / 32);
  std::cout << absl::StrFormat("{\"copy_gb_per_s\": %.1f, \"copied_bytes\": %d, \"matrix_tflop_per_s\": %.1f}",
                               2 * static_cast<double>(bytes) / copy / 1e9, bytes, flop / matrix / 1e12)
            << std::endl;
  return absl::OkStatus();
}

}  // namespace rwkv::gpu
