// A tokenizer from whatever file a user has.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "services/tokenizer/tokenizer.h"

namespace rwkv::tokenizer {

// Told by content, not by name: a JSON object is a Hugging Face tokenizer.json of GPT-NeoX (neox_tokenizer.h), anything
// else a vocabulary in the World file format (world_tokenizer.h), published or not. kNotFound, kPermissionDenied, ...:
// the file cannot be read. kInvalidArgument: too large, or neither of the two; the message begins with `path`.
absl::StatusOr<std::unique_ptr<Tokenizer>> OpenTokenizer(const std::string& path);

// `name` stands for the path in messages.
absl::StatusOr<std::unique_ptr<Tokenizer>> TokenizerFromString(absl::string_view content, absl::string_view name);

}  // namespace rwkv::tokenizer
