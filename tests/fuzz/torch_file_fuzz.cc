#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "services/worker/model/formats/tensor_record.h"
#include "services/worker/model/formats/torch_file.h"
#include "tests/fuzz/check_records.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::Span<const uint8_t> file(data, size);
  // Anything that is no legacy file goes to the zip reader, so that it need not first find four magic bytes.
  const absl::StatusOr<std::vector<rwkv::worker::TensorRecord>> records =
      rwkv::worker::LooksLikeTorchLegacy(file) ? rwkv::worker::ReadTorchLegacy(file) : rwkv::worker::ReadTorchZip(file);
  if (records.ok()) rwkv::testing::CheckRecords(*records, size);
  return 0;
}
