// A device over CUDA's runtime. Nothing runs on the default stream, and operations neither allocate nor wait.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "kernels/base/device.h"
#include "kernels/cuda/cublaslt.h"
#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/library_rows.h"
#include "kernels/cuda/runtime.h"

namespace rwkv::kernels::cuda {

// Without tensor cores sums are float, with the same bits on every GPU and in the emulation. With them the order of a
// sum is the hardware's: its family has the compute capability in its name.
inline constexpr absl::string_view kFp32Family = "cuda/fp32";

// How long the host waits for what a stream was given before it says that the GPU hangs: a step takes milliseconds, the
// longest prefill a second.
constexpr absl::Duration kHangLimit = absl::Seconds(60);

// What computes products with 16-bit weights. Those with int8 and int4 weights have the same bits everywhere.
enum class ProductsBy : uint8_t {
  kTensorCores,    // Inputs in three parts: sums of exact products.
  kNoTensorCores,  // The plain twin, which also has int8 and int4 weights.
  kRounded,        // Inputs rounded to the weights' type: a third of the work or less, another family.
  kLibrary,        // The same, of many rows by cuBLASLt: library_products.h. Bits depend on the number of rows.
};

struct DeviceOptions {
  absl::Duration hang_limit = kHangLimit;
  ProductsBy products_by = ProductsBy::kTensorCores;
  const cublaslt::CublasLt* library = nullptr;  // For kLibrary; null: the one that the dynamic linker finds.
  int64_t library_rows = kLibraryRows;          // Products of fewer rows are not the library's.
  bool half_states = false;  // wkv states of RWKV-5 to 7 are stored in fp16: half of their bytes, another family.
  bool overlaps = true;      // A kernel's blocks begin while the one before ends, from 9.0 on; without: the plain twin.
  bool graphs = true;  // Steps that come again are launched as a graph; without: kernel by kernel, the plain twin.
};

// Takes what may follow a device's name off its end, in this order: "/half" (wkv states in fp16), "/serial" (kernels do
// not overlap), one of "/fma" (no tensor cores), "/rounded" and "/lt" (ProductsBy), "/launches" (no graphs).
DeviceOptions TakeOptions(absl::string_view& name);

// The runtime's device `ordinal` under a name of the caller's. Runtime and kernels outlive it. After a fault of the
// GPU every call on it fails with that fault, and of one that hangs every wait ends after the limit
// (kDeadlineExceeded): the process must end.
// kUnimplemented: no driver, no such device, or one older than compute capability 8.0, or no cuBLASLt where the options
// want it; says which.
absl::StatusOr<std::unique_ptr<Device>> OpenDevice(const Runtime& runtime, const KernelSet& kernels, int ordinal,
                                                   absl::string_view name, const DeviceOptions& options = {});

}  // namespace rwkv::kernels::cuda
