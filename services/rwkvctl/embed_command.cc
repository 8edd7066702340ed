#include "services/rwkvctl/embed_command.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "rwkv/v1/generation.pb.h"
#include "services/rwkvctl/input.h"
#include "services/rwkvctl/json.h"

namespace rwkv::rwkvctl {
namespace {

absl::StatusOr<v1::EmbedSource> ParseSource(const std::string& name) {
  if (name == "hidden-last") return v1::EMBED_SOURCE_HIDDEN_LAST;
  if (name == "hidden-mean") return v1::EMBED_SOURCE_HIDDEN_MEAN;
  if (name == "state") return v1::EMBED_SOURCE_STATE;
  return absl::InvalidArgumentError(absl::StrCat("\"", name, "\" is not hidden-last, hidden-mean or state"));
}

class EmbedCommand : public Command {
 public:
  absl::string_view name() const override { return "embed"; }
  absl::string_view arguments() const override { return "[TEXT]"; }
  absl::string_view summary() const override { return "prints a text, or token ids, as one vector"; }
  absl::string_view details() const override {
    return "hidden-last is the final hidden state LN(x; ln_out) after the last token, hidden-mean its mean over all "
           "tokens,\n"
           "state the last layer's matrix state, flattened (not of RWKV-4). The input is fed as it is, without id 0 "
           "before\n"
           "it. The numbers are parted by blanks.\n";
  }

  void AddFlags(FlagSet& flags) override {
    input_.AddFlags(flags);
    flags.AddString("model", "NAME", "name or fingerprint (default: the model that is served)",
                    request_.mutable_model());
    flags.AddString("initial-state", "NAME", "begin with this tuned state (default: the model's own)",
                    request_.mutable_initial_state());
    flags.AddString("source", "NAME", "hidden-last (default), hidden-mean or state", [this](const std::string& value) {
      absl::StatusOr<v1::EmbedSource> source = ParseSource(value);
      if (source.ok()) request_.set_source(*source);
      return source.status();
    });
    flags.AddBool("normalize", "scale to length 1", &normalize_);
    flags.AddBool("json", "JSON: {\"values\": [...], \"prompt_tokens\": N}", &json_);
  }

  absl::Status Check(const std::vector<std::string>& positional) override {
    if (positional.size() > 1) return absl::InvalidArgumentError("more than one text is given; quote it");
    if (!positional.empty()) {
      if (absl::Status status = input_.SetText(positional[0]); !status.ok()) return status;
    }
    return input_.Check();
  }

  absl::Status Run(Context& context) override {
    absl::StatusOr<InputFlags::Input> input = input_.Read(context.in);
    if (!input.ok()) return input.status();
    if (input->is_text) {
      request_.set_text(std::move(input->text));
    } else {
      *request_.mutable_tokens() = std::move(input->tokens);
    }
    request_.set_normalize(normalize_);
    absl::StatusOr<v1::EmbedResponse> response = context.client->Embed(request_);
    if (!response.ok()) return response.status();
    if (json_) {
      const std::vector<float> values(response->values().begin(), response->values().end());
      context.out << DumpLine({{"values", values}, {"prompt_tokens", response->prompt_tokens()}});
    } else {
      context.out << absl::StrJoin(response->values(), " ", [](std::string* out, float value) {
        absl::StrAppendFormat(out, "%.9g", value);
      }) << "\n";
    }
    return absl::OkStatus();
  }

 private:
  InputFlags input_;
  v1::EmbedRequest request_;
  bool normalize_ = false;
  bool json_ = false;
};

}  // namespace

std::unique_ptr<Command> MakeEmbedCommand() { return std::make_unique<EmbedCommand>(); }

}  // namespace rwkv::rwkvctl
