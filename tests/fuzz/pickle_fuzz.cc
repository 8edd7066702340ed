#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/pickle.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using rwkv::checkpoint::Pickle;
  const absl::StatusOr<Pickle> pickle = Pickle::Parse(absl::MakeConstSpan(data, size));
  if (!pickle.ok()) return 0;
  if (pickle->size_bytes() <= 0 || static_cast<size_t>(pickle->size_bytes()) > size) abort();
  const auto tensors = pickle->StateDict();
  if (!tensors.ok()) return 0;
  for (const auto& [name, tensor] : *tensors) {
    if (tensor->storage < 0 || static_cast<size_t>(tensor->storage) >= pickle->storages().size()) abort();
    if (pickle->storages()[tensor->storage].elements < 0) abort();
    if (name.size() > size) abort();
  }
  return 0;
}
