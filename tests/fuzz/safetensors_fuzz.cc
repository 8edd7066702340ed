#include <cstddef>
#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/safetensors.h"
#include "tests/fuzz/check_records.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::StatusOr<rwkv::checkpoint::SafetensorsDirectory> directory =
      rwkv::checkpoint::ReadSafetensors(absl::MakeConstSpan(data, size));
  if (directory.ok()) rwkv::testing::CheckRecords(directory->tensors, size);
  return 0;
}
