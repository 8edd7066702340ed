#include "services/rwkvctl/input.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "services/tokenizer/stream_decoder.h"

namespace rwkv::rwkvctl {

absl::Status CheckUtf8(absl::string_view text) {
  if (tokenizer::IsValidUtf8(text)) return absl::OkStatus();
  return absl::InvalidArgumentError("the text is not valid UTF-8");
}

absl::StatusOr<std::string> ReadAll(std::istream& in, absl::string_view name) {
  constexpr size_t kMaxBytes = 64 << 20;
  std::string content;
  char buffer[1 << 16];
  errno = 0;
  while (in.read(buffer, sizeof(buffer)), in.gcount() > 0) {
    content.append(buffer, static_cast<size_t>(in.gcount()));
    if (content.size() > kMaxBytes) {
      return absl::InvalidArgumentError(absl::StrCat(name, " has more than ", kMaxBytes, " bytes"));
    }
  }
  if (in.bad()) return absl::UnavailableError(absl::StrCat("cannot read ", name, ": ", std::strerror(errno)));
  return content;
}

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot open ", path, ": ", std::strerror(errno)));
  return ReadAll(file, path);
}

void InputFlags::AddFlags(FlagSet& flags) {
  flags.AddString("prompt", "TEXT", "text to feed; - reads it from standard input",
                  [this](const std::string& value) { return SetText(value); });
  flags.AddString("tokens", "1,2,3", "token ids to feed", [this](const std::string& value) {
    absl::StatusOr<std::vector<uint32_t>> ids = ParseTokenIds(value);
    if (!ids.ok()) return ids.status();
    tokens_.emplace();
    tokens_->mutable_ids()->Add(ids->begin(), ids->end());
    return absl::OkStatus();
  });
}

absl::Status InputFlags::SetText(const std::string& text) {
  prompt_ = text;
  return CheckUtf8(text);
}

absl::Status InputFlags::Check() const {
  if (prompt_.has_value() == tokens_.has_value()) {
    return absl::InvalidArgumentError(prompt_.has_value() ? "--prompt and --tokens exclude each other"
                                                          : "--prompt TEXT or --tokens 1,2,3 is needed");
  }
  return absl::OkStatus();
}

absl::StatusOr<InputFlags::Input> InputFlags::Read(std::istream& in) const {
  Input input;
  if (tokens_.has_value()) {
    input.tokens = *tokens_;
    return input;
  }
  input.is_text = true;
  input.text = prompt_.value_or("");
  if (input.text == "-") {
    absl::StatusOr<std::string> text = ReadAll(in);
    if (!text.ok()) return text.status();
    if (absl::Status status = CheckUtf8(*text); !status.ok()) return status;
    input.text = *std::move(text);
  }
  return input;
}

}  // namespace rwkv::rwkvctl
