#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "services/checkpoint/dialects/rwkv_cpp_dialect.h"
#include "services/checkpoint/formats/rwkv_cpp.h"
#include "services/checkpoint/formats/tensor_record.h"
#include "tests/fuzz/check_records.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  absl::StatusOr<rwkv::checkpoint::RwkvCppDirectory> directory =
      rwkv::checkpoint::ReadRwkvCpp(absl::MakeConstSpan(data, size));
  if (!directory.ok()) return 0;
  rwkv::testing::CheckRecords(directory->tensors, size);
  const absl::StatusOr<std::vector<rwkv::checkpoint::TensorRecord>> records =
      rwkv::checkpoint::RwkvCppToOriginal(*std::move(directory));
  if (records.ok()) rwkv::testing::CheckRecords(*records, size);
  return 0;
}
