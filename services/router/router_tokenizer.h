// A tokenizer from whatever file an operator has: one of its own, or a model that brings its vocabulary.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "services/tokenizer/tokenizer.h"

namespace rwkv::router {

// A GGUF model gives the vocabulary inside it, of which only the file's directory is read; any other file is for
// tokenizer::OpenTokenizer. Errors are those of either, and begin with `path`.
absl::StatusOr<std::unique_ptr<tokenizer::Tokenizer>> OpenRouterTokenizer(const std::string& path);

}  // namespace rwkv::router
