#include "services/rwkvctl/state_command.h"

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/rwkvctl/session_file.h"

namespace rwkv::rwkvctl {
namespace {

class StateCommand : public Command {
 public:
  absl::string_view name() const override { return "state"; }
  absl::string_view summary() const override { return "writes the recurrent state of a session"; }
  absl::string_view details() const override {
    return "The file is .safetensors, float32: blocks.N.att.x_prev [D], blocks.N.att.state [head, value, key] and\n"
           "blocks.N.ffn.x_prev [D]. __metadata__ says at which position of the session the state stands, and of "
           "which\n"
           "model it is. It is what `sessions export` writes, without the log.\n";
  }

  void AddFlags(FlagSet& flags) override {
    flags.AddString("session", "ID", "whose state", [this](const std::string& value) {
      request_.set_session_id(value);
      return absl::OkStatus();
    });
    flags.AddString("out", "FILE", "the .safetensors file to write", [this](const std::string& value) {
      path_ = value;
      return absl::OkStatus();
    });
  }

  absl::Status Check(const std::vector<std::string>& positional) override {
    if (absl::Status status = CheckNoArguments(positional); !status.ok()) return status;
    if (request_.session_id().empty()) return absl::InvalidArgumentError("--session ID is needed");
    if (path_.empty()) return absl::InvalidArgumentError("--out FILE.safetensors is needed");
    return absl::OkStatus();
  }

  absl::Status Run(Context& context) override {
    return ExportSession(context, request_.session_id(), /*with_log=*/false, path_).status();
  }

 private:
  v1::SessionsExportStateRequest request_;
  std::string path_;
};

}  // namespace

std::unique_ptr<Command> MakeStateCommand() { return std::make_unique<StateCommand>(); }

}  // namespace rwkv::rwkvctl
