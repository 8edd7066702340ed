// Bytes in pieces that may end inside a character; UTF-8 text out that never does.
#pragma once

#include <string>

#include "absl/strings/string_view.h"

namespace rwkv::tokenizer {

// Holds back at most 3 bytes, and only while they may still become a character. What cannot is replaced by U+FFFD at
// once, one for each maximal ill-formed part (Unicode 15, 3.9, "U+FFFD substitution of maximal subparts"). All results
// joined are independent of where the pieces were cut. Not thread-safe.
class StreamDecoder {
 public:
  std::string Push(absl::string_view bytes);
  std::string Finish();  // What was held back, replaced. The decoder is as new afterwards.

 private:
  std::string pending_;
};

// The whole of `bytes` at once.
std::string DecodeUtf8(absl::string_view bytes);

bool IsValidUtf8(absl::string_view bytes);

}  // namespace rwkv::tokenizer
