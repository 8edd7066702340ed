// Where a command's input comes from: --prompt TEXT, --prompt - (standard input) or --tokens 1,2,3.
#pragma once

#include <istream>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "rwkv/v1/common.pb.h"
#include "services/rwkvctl/flag_set.h"

namespace rwkv::rwkvctl {

class InputFlags {
 public:
  void AddFlags(FlagSet& flags);
  // As --prompt does, for a command that takes its text as an argument.
  absl::Status SetText(const std::string& text);
  absl::Status Check() const;  // Exactly one of the two.
  bool has_input() const { return prompt_.has_value() || tokens_.has_value(); }

  struct Input {
    bool is_text = false;
    std::string text;  // UTF-8.
    v1::TokenList tokens;
  };
  // Without either of the two: an empty text. kInvalidArgument: standard input is not UTF-8 or too large.
  absl::StatusOr<Input> Read(std::istream& in) const;

 private:
  absl::optional<std::string> prompt_;
  absl::optional<v1::TokenList> tokens_;
};

// kInvalidArgument if the bytes are not UTF-8, which text fields of the API have to be.
absl::Status CheckUtf8(absl::string_view text);

// Everything up to the end; kInvalidArgument beyond 64 MiB. `name` is what errors call it.
absl::StatusOr<std::string> ReadAll(std::istream& in, absl::string_view name = "standard input");

// The whole file; kNotFound: it cannot be opened. kInvalidArgument: above 64 MiB.
absl::StatusOr<std::string> ReadFile(const std::string& path);

}  // namespace rwkv::rwkvctl
