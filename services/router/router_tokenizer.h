// A tokenizer from whatever file an operator has: one of its own, or a model that brings its vocabulary.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "services/tokenizer/tokenizer.h"

namespace rwkv::router {

struct RouterTokenizer {
  std::unique_ptr<tokenizer::Tokenizer> tokenizer;  // Null: the model brings none that texts can be read with,
  std::string unusable;                             // and why; it begins with the path.
};

// A GGUF model gives the vocabulary inside it, of which only the file's directory is read; any other file is for
// tokenizer::OpenTokenizer. Errors are those of either, and begin with `path`; but a model whose vocabulary is none, or
// not one of RWKV's, is no error: it can be served by token ids.
absl::StatusOr<RouterTokenizer> OpenRouterTokenizer(const std::string& path);

}  // namespace rwkv::router
