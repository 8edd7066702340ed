#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/string_view.h"
#include "services/tokenizer/open_tokenizer.h"
#include "services/tokenizer/stream_decoder.h"
#include "services/tokenizer/tokenizer.h"
#include "services/tokenizer/unicode.h"
#include "tests/fuzz/small_tokenizers.h"

namespace rwkv::tokenizer {
namespace {

void Require(bool condition) {
  if (!condition) abort();
}

const Tokenizer& World() {
  static const Tokenizer& world = *TokenizerFromString(testing::SmallWorldVocabulary(), "world").value().release();
  return world;
}

const Tokenizer& Neox() {
  static const Tokenizer& neox = *TokenizerFromString(testing::SmallNeoxTokenizer(), "neox").value().release();
  return neox;
}

// Decoding byte by byte is decoding at once, and always UTF-8.
void CheckStreamDecoder(absl::string_view input) {
  StreamDecoder decoder;
  std::string text;
  for (size_t i = 0; i < input.size(); ++i) {
    const std::string part = decoder.Push(input.substr(i, 1));
    Require(IsValidUtf8(part));
    text += part;
  }
  text += decoder.Finish();
  Require(text == DecodeUtf8(input));
  if (IsValidUtf8(input)) Require(text == input);
}

void CheckNeox(absl::string_view input) {
  const std::string text = DecodeUtf8(input);
  const std::string normalized = NormalizeNfc(text);
  Require(IsValidUtf8(normalized));
  Require(NormalizeNfc(normalized) == normalized);
  Require(Neox().Encode(input) == Neox().Encode(text));
  Require(Neox().Decode(Neox().EncodePlain(text)) == normalized);
  if (absl::StrContains(text, "<|endoftext|>") || absl::StrContains(text, "<|padding|>")) return;  // Without text.
  Require(Neox().Encode(text) == Neox().EncodePlain(text));
}

}  // namespace
}  // namespace rwkv::tokenizer

// Any bytes through every tokenizer and back.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace rwkv::tokenizer;
  const absl::string_view input(reinterpret_cast<const char*>(data), size);
  Require(World().Decode(World().Encode(input)) == input);
  CheckStreamDecoder(input);
  CheckNeox(input);
  return 0;
}
