#include "services/router/router_tokenizer.h"

#include <cstdio>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/checkpoint.h"
#include "services/tokenizer/open_tokenizer.h"
#include "services/tokenizer/world_tokenizer.h"

namespace rwkv::router {
namespace {

// False too for a file that cannot be read: whoever opens it next says why.
bool IsGguf(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), &std::fclose);
  char magic[4];
  return file != nullptr && std::fread(magic, 1, sizeof(magic), file.get()) == sizeof(magic) &&
         absl::string_view(magic, sizeof(magic)) == "GGUF";
}

}  // namespace

absl::StatusOr<RouterTokenizer> OpenRouterTokenizer(const std::string& path) {
  RouterTokenizer opened;
  if (!IsGguf(path)) {
    RWKV_ASSIGN_OR_RETURN(opened.tokenizer, tokenizer::OpenTokenizer(path));
    return opened;
  }
  RWKV_ASSIGN_OR_RETURN(const std::shared_ptr<const checkpoint::Checkpoint> model, checkpoint::Checkpoint::Open(path));
  absl::StatusOr<std::vector<std::string>> tokens = model->Vocabulary();
  if (!tokens.ok()) {
    opened.unusable = std::string(tokens.status().message());
    return opened;
  }
  auto tokenizer = tokenizer::WorldTokenizer::FromTokens(*std::move(tokens), path);
  if (tokenizer.ok()) {
    opened.tokenizer = *std::move(tokenizer);
  } else {
    opened.unusable = std::string(tokenizer.status().message());
  }
  return opened;
}

}  // namespace rwkv::router
