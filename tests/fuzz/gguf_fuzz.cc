#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "services/checkpoint/dialects/gguf_dialect.h"
#include "services/checkpoint/formats/gguf.h"
#include "tests/fuzz/check_records.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  absl::StatusOr<rwkv::checkpoint::GgufDirectory> directory =
      rwkv::checkpoint::ReadGguf(absl::MakeConstSpan(data, size));
  if (!directory.ok()) return 0;
  rwkv::testing::CheckRecords(directory->tensors, size);
  // Views of the file: touch every byte, for the address sanitizer.
  size_t text = 0;
  for (absl::string_view token : directory->tokens) text += std::string(token).size();
  if (text > size) abort();
  const absl::StatusOr<std::vector<std::string>> vocabulary =
      rwkv::checkpoint::GgufVocabulary(directory->metadata, directory->tokens, directory->token_types);
  if (vocabulary.ok() && vocabulary->size() != directory->tokens.size()) abort();
  if (!rwkv::checkpoint::GgufToOriginal(directory->metadata, &directory->tensors).ok()) return 0;
  rwkv::testing::CheckRecords(directory->tensors, size);
  return 0;
}
