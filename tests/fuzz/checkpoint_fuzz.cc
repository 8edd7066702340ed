// The whole way of a file into a worker: open, config, weights, fingerprint.
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "kernels/base/device.h"
#include "kernels/dispatch/open_device.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/fingerprint.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/model_config.h"
#include "services/worker/model/layer_range.h"
#include "services/worker/model/weights.h"

namespace rwkv::worker {
namespace {

void OpenAll(const std::string& path, size_t size) {
  const absl::StatusOr<std::shared_ptr<const checkpoint::Checkpoint>> checkpoint = checkpoint::Checkpoint::Open(path);
  if (!checkpoint.ok()) return;
  int64_t total = 0;
  for (const checkpoint::TensorInfo& info : (*checkpoint)->tensors()) {
    const absl::StatusOr<checkpoint::Tensor> tensor = (*checkpoint)->Read(info.name);
    if (!tensor.ok() || tensor->info != &info) abort();
    if (reinterpret_cast<uintptr_t>(tensor->data) % static_cast<uintptr_t>(checkpoint::ElementSize(info.type)) != 0)
      abort();
    // Touch every byte, for the address sanitizer.
    std::vector<uint8_t> bytes(static_cast<const uint8_t*>(tensor->data),
                               static_cast<const uint8_t*>(tensor->data) + info.bytes);
    std::vector<uint8_t> read(bytes.size());
    if (!(*checkpoint)->ReadBytes(info, 0, absl::MakeSpan(read)).ok() || read != bytes) abort();
    total += info.bytes;
  }
  // Twice the file, and eight bytes for one where blocks of four bits are read as fp32.
  if (total / 16 > static_cast<int64_t>(size)) abort();
  if (!checkpoint::Fingerprint(**checkpoint).ok()) abort();
  const absl::StatusOr<checkpoint::ModelConfig> config = checkpoint::ModelConfig::FromCheckpoint(**checkpoint);
  if (!config.ok()) return;
  static kernels::Device* const device = kernels::OpenDevice("reference")->release();
  const auto weights = StageWeights::Load(*checkpoint, *config, LayerRange{0, config->layer_count}, *device);
  if (!weights.ok() && weights.status().code() != absl::StatusCode::kDataLoss) abort();  // Only not-finite is left.
}

}  // namespace
}  // namespace rwkv::worker

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const int descriptor = memfd_create("fuzz", MFD_CLOEXEC);
  if (descriptor < 0 || write(descriptor, data, size) != static_cast<ssize_t>(size)) abort();
  rwkv::worker::OpenAll(absl::StrCat("/proc/self/fd/", descriptor), size);
  close(descriptor);
  return 0;
}
