#include "services/rwkvctl/logits_command.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "rwkv/v1/generation.pb.h"
#include "services/rwkvctl/npy_writer.h"

namespace rwkv::rwkvctl {
namespace {

class LogitsCommand : public Command {
 public:
  absl::string_view name() const override { return "logits"; }
  absl::string_view summary() const override { return "writes the logits after every token (a debugging call)"; }
  absl::string_view details() const override {
    return "The file is NumPy's, float32 [tokens, vocabulary], computed from a fresh state through the whole pipeline. "
           "The\n"
           "router has to run with --allow_logits, as the local cluster's does.\n";
  }

  void AddFlags(FlagSet& flags) override {
    flags.AddString("tokens", "1,2,3", "token ids to feed", [this](const std::string& value) {
      absl::StatusOr<std::vector<uint32_t>> ids = ParseTokenIds(value);
      if (!ids.ok()) return ids.status();
      request_.mutable_tokens()->mutable_ids()->Assign(ids->begin(), ids->end());
      return absl::OkStatus();
    });
    flags.AddString("out", "FILE", "the .npy file to write", [this](const std::string& value) {
      path_ = value;
      return absl::OkStatus();
    });
    flags.AddString("model", "NAME", "name or fingerprint (default: the model that is served)",
                    request_.mutable_model());
    flags.AddString("initial-state", "NAME", "begin with this tuned state (default: the model's own)",
                    request_.mutable_initial_state());
  }

  absl::Status Check(const std::vector<std::string>& positional) override {
    if (absl::Status status = CheckNoArguments(positional); !status.ok()) return status;
    if (!request_.has_tokens()) return absl::InvalidArgumentError("--tokens 1,2,3 is needed");
    if (path_.empty()) return absl::InvalidArgumentError("--out FILE.npy is needed");
    return absl::OkStatus();
  }

  absl::Status Run(Context& context) override {
    const auto tokens = static_cast<uint64_t>(request_.tokens().ids_size());
    absl::optional<NpyWriter> writer;
    uint64_t next_row = 0;
    absl::Status status = context.client->Logits(request_, [&](const v1::LogitsResponse& response) {
      if (response.first_row() != next_row || response.vocab_size() == 0 ||
          response.logits().size() != uint64_t{response.rows()} * response.vocab_size() * sizeof(float)) {
        return absl::DataLossError(absl::StrCat("rows ", response.first_row(), " + ", response.rows(), " of ",
                                                response.vocab_size(), " logits came as ", response.logits().size(),
                                                " bytes where row ", next_row, " was expected"));
      }
      next_row += response.rows();
      if (!writer.has_value()) {
        absl::StatusOr<NpyWriter> created = NpyWriter::Create(path_, tokens, response.vocab_size());
        if (!created.ok()) return created.status();
        writer.emplace(*std::move(created));
      }
      return writer->Append(response.logits());
    });
    if (!status.ok()) return status;
    if (!writer.has_value()) return absl::DataLossError("the router sent no logits");
    return writer->Finish();
  }

 private:
  v1::LogitsRequest request_;
  std::string path_;
};

}  // namespace

std::unique_ptr<Command> MakeLogitsCommand() { return std::make_unique<LogitsCommand>(); }

}  // namespace rwkv::rwkvctl
