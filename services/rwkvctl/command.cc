#include "services/rwkvctl/command.h"

#include "absl/strings/str_cat.h"

namespace rwkv::rwkvctl {

absl::Status CheckNoArguments(const std::vector<std::string>& positional) {
  if (positional.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("unexpected argument \"", positional[0], "\""));
}

absl::Status FlushOutput(std::ostream& out) {
  out.flush();
  if (out.good()) return absl::OkStatus();
  return absl::UnavailableError("cannot write to standard output");
}

}  // namespace rwkv::rwkvctl
