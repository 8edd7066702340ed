#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/tensor_record.h"
#include "services/checkpoint/formats/torch_file.h"
#include "tests/fuzz/check_records.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::Span<const uint8_t> file(data, size);
  // Anything that is no legacy file goes to the zip reader, so that it need not first find four magic bytes.
  const absl::StatusOr<rwkv::checkpoint::TorchDirectory> directory = rwkv::checkpoint::LooksLikeTorchLegacy(file)
                                                                         ? rwkv::checkpoint::ReadTorchLegacy(file)
                                                                         : rwkv::checkpoint::ReadTorchZip(file);
  if (directory.ok()) rwkv::testing::CheckRecords(directory->tensors, size);
  return 0;
}
