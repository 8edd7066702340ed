#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "services/tokenizer/open_tokenizer.h"
#include "services/tokenizer/tokenizer.h"
#include "tests/fuzz/small_tokenizers.h"

namespace {

// What is read has to work, whatever it says.
void Check(absl::string_view json, absl::string_view text) {
  const absl::StatusOr<std::unique_ptr<rwkv::tokenizer::Tokenizer>> tokenizer =
      rwkv::tokenizer::TokenizerFromString(json, "fuzz");
  if (!tokenizer.ok()) return;
  for (uint32_t id : (*tokenizer)->Encode(text)) {
    if (id >= (*tokenizer)->vocab_size()) abort();
  }
  if ((*tokenizer)->end_of_text() >= (*tokenizer)->vocab_size()) abort();
}

}  // namespace

// The input as a whole file, and as its list of merges.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view input(reinterpret_cast<const char*>(data), size);
  Check(input, input);
  Check(rwkv::testing::SmallNeoxTokenizer(input), input);
  return 0;
}
