#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "services/tokenizer/world_tokenizer.h"
#include "tests/fuzz/small_tokenizers.h"

// The input as a whole vocabulary, and as its lines from 257 on.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using rwkv::tokenizer::WorldTokenizer;
  const absl::string_view input(reinterpret_cast<const char*>(data), size);
  (void)WorldTokenizer::FromString(input, "fuzz").ok();
  static const std::string& single_bytes = *new std::string(rwkv::testing::SingleByteLines());
  const absl::StatusOr<std::unique_ptr<WorldTokenizer>> read =
      WorldTokenizer::FromString(absl::StrCat(single_bytes, input), "fuzz");
  if (!read.ok()) return 0;
  const WorldTokenizer& tokenizer = **read;
  for (uint32_t id = 1; id < tokenizer.vocab_size(); ++id) {
    if (tokenizer.Encode(tokenizer.TokenBytes(id)) != std::vector<uint32_t>{id}) abort();  // It is its longest match.
  }
  if (tokenizer.Decode(tokenizer.Encode(input)) != input) abort();
  return 0;
}
