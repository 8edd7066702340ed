#include "services/tokenizer/open_tokenizer.h"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdio>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "services/tokenizer/neox_tokenizer.h"
#include "services/tokenizer/neox_vocabulary.h"
#include "services/tokenizer/world_tokenizer.h"

namespace rwkv::tokenizer {
namespace {

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  constexpr size_t kMaxBytes = std::max(WorldTokenizer::kMaxFileBytes, kMaxNeoxFileBytes);
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), &std::fclose);
  if (file == nullptr) return absl::ErrnoToStatus(errno, absl::StrCat("cannot open ", path));
  std::string content;
  char buffer[1 << 16];
  while (const size_t n = std::fread(buffer, 1, sizeof(buffer), file.get())) {
    content.append(buffer, n);
    if (content.size() > kMaxBytes) {
      return absl::InvalidArgumentError(absl::StrCat(path, " has more than the ", kMaxBytes, " bytes of a tokenizer"));
    }
  }
  if (std::ferror(file.get())) return absl::ErrnoToStatus(errno, absl::StrCat("cannot read ", path));
  return content;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> OpenTokenizer(const std::string& path) {
  absl::StatusOr<std::string> content = ReadFile(path);
  if (!content.ok()) return content.status();
  return TokenizerFromString(*content, path);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> TokenizerFromString(absl::string_view content, absl::string_view name) {
  if (absl::StartsWith(absl::StripLeadingAsciiWhitespace(content), "{"))
    return NeoxTokenizer::FromString(content, name);
  return WorldTokenizer::FromString(content, name);
}

}  // namespace rwkv::tokenizer
