#include "services/tokenizer/tokenizer_fuzz_body.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "services/tokenizer/stream_decoder.h"
#include "services/tokenizer/world_tokenizer.h"

namespace rwkv::tokenizer {
namespace {

void Require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "does not hold: %s\n", what);
  std::abort();
}

// The 256 single bytes, without which no vocabulary is accepted.
std::string SingleBytes() {
  std::string lines;
  for (int byte = 0; byte < 256; ++byte) {
    absl::StrAppend(&lines, byte + 1, " b'\\x", absl::Hex(byte, absl::kZeroPad2), "' 1\n");
  }
  return lines;
}

}  // namespace

void CheckTokenizer(const uint8_t* data, size_t size) {
  const absl::string_view input(reinterpret_cast<const char*>(data), size);
  static const std::string& single_bytes = *new std::string(SingleBytes());
  static const WorldTokenizer& fixed =
      *WorldTokenizer::FromString(
           absl::StrCat(single_bytes, "257 '  ' 2\n258 'ab' 2\n259 'abc' 3\n260 b'\\xe4\\xbd' 2\n261 'abcabc' 6\n"),
           "fixed")
           .value()
           .release();

  Require(fixed.Decode(fixed.Encode(input)) == input, "Decode(Encode(x)) == x");

  StreamDecoder decoder;
  std::string text;
  for (size_t i = 0; i < size; ++i) {
    const std::string part = decoder.Push(input.substr(i, 1));
    Require(IsValidUtf8(part), "every piece is UTF-8");
    text += part;
  }
  text += decoder.Finish();
  Require(text == DecodeUtf8(input), "pieces equal the whole");
  if (IsValidUtf8(input)) Require(text == input, "valid text is unchanged");

  // The input as a whole vocabulary, and as its lines from 257 on.
  (void)WorldTokenizer::FromString(input, "fuzz").ok();
  const absl::StatusOr<std::unique_ptr<WorldTokenizer>> read =
      WorldTokenizer::FromString(absl::StrCat(single_bytes, input), "fuzz");
  if (!read.ok()) return;
  for (uint32_t id = 1; id < (*read)->vocab_size(); ++id) {
    const absl::string_view token = (*read)->TokenBytes(id);
    Require((*read)->Encode(token) == std::vector<uint32_t>{id}, "a token is its own encoding");
  }
  Require((*read)->Decode((*read)->Encode(input)) == input, "Decode(Encode(x)) == x with the vocabulary read");
}

}  // namespace rwkv::tokenizer
