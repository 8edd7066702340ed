#include "services/rwkvctl/state_command.h"

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/rwkvctl/safetensors_writer.h"

namespace rwkv::rwkvctl {
namespace {

class StateCommand : public Command {
 public:
  absl::string_view name() const override { return "state"; }
  absl::string_view summary() const override { return "writes the recurrent state of a session"; }
  absl::string_view details() const override {
    return "The file is .safetensors, float32: blocks.N.att.x_prev [D], blocks.N.att.state [head, value, key] and\n"
           "blocks.N.ffn.x_prev [D]. __metadata__ says at which position of the session the state stands.\n";
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
    TensorCollector collector;
    absl::optional<uint64_t> position;
    absl::Status status = context.client->ExportState(request_, [&](const v1::SessionsExportStateResponse& response) {
      if (position.value_or(response.position()) != response.position()) {
        return absl::DataLossError(absl::StrCat("the state's position changes from ", *position, " to ",
                                                response.position(), " at tensor ", response.tensor()));
      }
      position = response.position();
      const std::vector<int64_t> shape(response.shape().begin(), response.shape().end());
      return collector.Add(response.tensor(), shape, response.offset_bytes(), response.data());
    });
    if (status.ok()) status = collector.Finish();
    if (!status.ok()) return status;
    return WriteSafetensors(path_, collector.tensors(),
                            {{"position", absl::StrCat(*position)}, {"session", request_.session_id()}});
  }

 private:
  v1::SessionsExportStateRequest request_;
  std::string path_;
};

}  // namespace

std::unique_ptr<Command> MakeStateCommand() { return std::make_unique<StateCommand>(); }

}  // namespace rwkv::rwkvctl
