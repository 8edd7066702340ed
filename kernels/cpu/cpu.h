// The vectorised CPU: one source, compiled for each instruction set, chosen at run time by what the processor has.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/base/device.h"
#include "kernels/cpu/kernel_set.h"

namespace rwkv::kernels::cpu {

struct Backend {
  absl::string_view name;
  absl::string_view numeric_family;
  const KernelSet* kernels;  // Lives as long as the process.
  bool runs_here;            // This processor and operating system have the instructions.
  // What products with bf16 weights read is rounded to bf16 first, for whoever asks for that by name.
  bool rounds_inputs = false;
};

// From slow to fast, those of this architecture: "cpu/portable" (always runs); on x86-64 "cpu/avx2", "cpu/avx512" and
// "cpu/avx512vnni", which give the same bits, "cpu/amx", and before the last two "cpu/avx512/bf16" and "cpu/amx/bf16",
// which round inputs; on aarch64 "cpu/neon", whose bits are others where numbers are subnormal.
std::vector<Backend> Backends();

// The device of a backend that runs here: host memory and its operations. Every stream has a team of `threads` threads,
// the caller's among them; 0: as many as the process may use processors (processors.h).
// kInvalidArgument: another number than a team can have.
absl::StatusOr<std::unique_ptr<Device>> OpenDevice(const Backend& backend, int threads);

}  // namespace rwkv::kernels::cpu
