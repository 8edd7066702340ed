// Opens the device that a process computes on, once, at start.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/base/device.h"

namespace rwkv::kernels {

// `request` is "auto" (the first GPU, or without one as "cpu"), "cpu" (the fastest instruction set of this processor),
// or a device's name: "cuda:0", "cpu/amx", "cpu/avx512vnni", "cpu/avx512", "cpu/avx2", "cpu/neon", "cpu/portable",
// "reference", or "cpu/amx/bf16" and "cpu/avx512/bf16", which round the inputs of bf16 products to bf16, or
// "cuda:0/rounded" and "cuda:0/lt", which round those of bf16 and fp16 to the weights' type; with the last one a row's
// bits depend on how many rows there are (kernels/cuda/library_products.h). Thread-safe.
// `threads`: that a CPU computes on, the caller's among them; 0: as many as this process may use processors. They
// change no bit. The reference has one, of a GPU it means nothing.
// kInvalidArgument: no such device (the message lists them) or number of threads. kUnimplemented: this machine or build
// cannot run it.
absl::StatusOr<std::unique_ptr<Device>> OpenDevice(absl::string_view request, int threads = 0);

// The names of all devices that this machine can open, the plain reference first, the fastest CPU behind the others,
// then the GPUs. Without those that round inputs.
std::vector<std::string> AvailableDevices();

// Why "auto" is a CPU here: what the build lacks, or what CUDA says. Empty if it is a GPU.
std::string WhyNoGpu();

}  // namespace rwkv::kernels
