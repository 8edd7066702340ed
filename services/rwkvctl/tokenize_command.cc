#include "services/rwkvctl/tokenize_command.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_join.h"
#include "absl/types/optional.h"
#include "rwkv/v1/generation.pb.h"
#include "services/rwkvctl/input.h"
#include "services/rwkvctl/json.h"

namespace rwkv::rwkvctl {
namespace {

class TokenizeCommand : public Command {
 public:
  absl::string_view name() const override { return "tokenize"; }
  absl::string_view arguments() const override { return "[TEXT]"; }
  absl::string_view summary() const override { return "prints the token ids of a text"; }
  absl::string_view details() const override {
    return "Without TEXT, or with -, it is read from standard input; there it may be any bytes.\n";
  }

  void AddFlags(FlagSet& flags) override {
    flags.AddString("prompt", "TEXT", "the text", [this](const std::string& value) {
      text_ = value;
      return absl::OkStatus();
    });
    flags.AddString("model", "NAME", "name or fingerprint (default: the model that is served)",
                    [this](const std::string& value) {
                      request_.set_model(value);
                      return absl::OkStatus();
                    });
    flags.AddBool("json", "JSON: {\"ids\": [...]}", &json_);
  }

  absl::Status Check(const std::vector<std::string>& positional) override {
    if (positional.size() + text_.has_value() > 1) {
      return absl::InvalidArgumentError("more than one text is given; quote it");
    }
    if (!positional.empty()) text_ = positional[0];
    return absl::OkStatus();
  }

  absl::Status Run(Context& context) override {
    if (text_.value_or("-") == "-") {
      absl::StatusOr<std::string> text = ReadAll(context.in);
      if (!text.ok()) return text.status();
      text_ = *std::move(text);
    }
    request_.set_data(*text_);
    absl::StatusOr<v1::TokenizeResponse> response = context.client->Tokenize(request_);
    if (!response.ok()) return response.status();
    const std::vector<uint32_t> ids(response->token_ids().begin(), response->token_ids().end());
    if (json_) {
      context.out << DumpLine({{"ids", ids}});
    } else {
      context.out << absl::StrJoin(ids, " ") << "\n";
    }
    return absl::OkStatus();
  }

 private:
  v1::TokenizeRequest request_;
  absl::optional<std::string> text_;
  bool json_ = false;
};

class DetokenizeCommand : public Command {
 public:
  absl::string_view name() const override { return "detokenize"; }
  absl::string_view arguments() const override { return "[ID...]"; }
  absl::string_view summary() const override { return "prints the bytes of token ids"; }
  absl::string_view details() const override {
    return "Ids are parted by commas or blanks. Without any they are read from standard input. The bytes come as they "
           "are,\n"
           "and no line end is added; --json replaces what is not UTF-8.\n";
  }

  void AddFlags(FlagSet& flags) override {
    flags.AddString("tokens", "1,2,3", "the token ids", [this](const std::string& value) {
      tokens_ = value;
      return absl::OkStatus();
    });
    flags.AddString("model", "NAME", "name or fingerprint (default: the model that is served)",
                    [this](const std::string& value) {
                      request_.set_model(value);
                      return absl::OkStatus();
                    });
    flags.AddBool("json", "JSON: {\"text\": \"...\"}", &json_);
  }

  absl::Status Check(const std::vector<std::string>& positional) override {
    if (!positional.empty() && tokens_.has_value()) {
      return absl::InvalidArgumentError("ids and --tokens exclude each other");
    }
    if (!positional.empty()) tokens_ = absl::StrJoin(positional, " ");
    return tokens_.has_value() ? SetIds(*tokens_) : absl::OkStatus();
  }

  absl::Status Run(Context& context) override {
    if (!tokens_.has_value()) {
      absl::StatusOr<std::string> text = ReadAll(context.in);
      if (!text.ok()) return text.status();
      if (absl::Status status = SetIds(*text); !status.ok()) return status;
    }
    absl::StatusOr<v1::DetokenizeResponse> response = context.client->Detokenize(request_);
    if (!response.ok()) return response.status();
    if (json_) {
      context.out << DumpLine({{"text", response->data()}});
    } else {
      context.out << response->data();
    }
    return absl::OkStatus();
  }

 private:
  absl::Status SetIds(absl::string_view text) {
    absl::StatusOr<std::vector<uint32_t>> ids = ParseTokenIds(text);
    if (!ids.ok()) return ids.status();
    request_.mutable_token_ids()->Assign(ids->begin(), ids->end());
    return absl::OkStatus();
  }

  v1::DetokenizeRequest request_;
  absl::optional<std::string> tokens_;
  bool json_ = false;
};

}  // namespace

std::unique_ptr<Command> MakeTokenizeCommand() { return std::make_unique<TokenizeCommand>(); }

std::unique_ptr<Command> MakeDetokenizeCommand() { return std::make_unique<DetokenizeCommand>(); }

}  // namespace rwkv::rwkvctl
