#include "services/rwkvctl/generate_command.h"

#include <utility>

#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/types/optional.h"
#include "rwkv/v1/generation.pb.h"
#include "services/rwkvctl/chat_prompt.h"
#include "services/rwkvctl/input.h"
#include "services/rwkvctl/json.h"
#include "services/rwkvctl/sampling_flags.h"

namespace rwkv::rwkvctl {
namespace {

class GenerateCommand : public Command {
 public:
  absl::string_view name() const override { return "generate"; }
  absl::string_view summary() const override { return "feeds a prompt and streams what the model says"; }
  absl::string_view details() const override {
    return "Text goes to standard output as it comes. A model without a tokenizer takes --tokens, and its ids are "
           "printed,\n"
           "parted by blanks. --json prints an object per token {index, id, text, logprob} and a last one with\n"
           "finish_reason, counts and timings. With a session a lost connection is taken up again by itself.\n"
           "With --template the prompt is what a user says: one turn of a chat, as models were trained on it.\n"
           "A session without --prompt goes on from what it has: after --max-tokens, after --max-tokens 0, or, "
           "rewound\n"
           "to before an answer, with another one.\n";
  }

  void AddFlags(FlagSet& flags) override {
    input_.AddFlags(flags);
    flags.AddString("model", "NAME", "name or fingerprint (default: the model that is served)",
                    request_.mutable_model());
    flags.AddString("session", "ID", "go on with this session", request_.mutable_session_id());
    flags.AddString("initial-state", "NAME", "begin with this tuned state (default: the model's or the session's own)",
                    request_.mutable_initial_state());
    flags.AddString("request-id", "ID", "names the turn: sent twice, it runs once", request_.mutable_request_id());
    flags.AddUint32("max-tokens", "at most so many (default 256)",
                    [this](uint32_t value) { request_.set_max_tokens(value); });
    prompt_.AddFlags(flags);
    AddSamplingFlags(flags, request_.mutable_sampling());
    flags.AddString("stop", "TEXT", "end before this text; may be given often", [this](const std::string& value) {
      request_.add_stop(value);
      return CheckUtf8(value);
    });
    flags.AddUint32("stop-token", "end at this token id; may be given often",
                    [this](uint32_t value) { request_.add_stop_token_ids(value); });
    flags.AddBool("ignore-eos", "go on past the end of text", &ignore_end_of_text_);
    flags.AddUint32("logprobs", "with --json: also the N likeliest tokens at each place",
                    [this](uint32_t value) { request_.mutable_sampling()->set_top_logprobs(value); });
    flags.AddUint64("resume-from", "index of the first token to send; those before it were received",
                    [this](uint64_t value) { request_.set_resume_from(value); });
    flags.AddBool("json", "one JSON object per line", &json_);
  }

  absl::Status Check(const std::vector<std::string>& positional) override {
    if (absl::Status status = CheckNoArguments(positional); !status.ok()) return status;
    if (request_.session_id().empty() || input_.has_input()) {
      if (absl::Status status = input_.Check(); !status.ok()) return status;
    }
    if (absl::Status status = prompt_.CheckNeedsTemplate(); !status.ok()) return status;
    if (prompt_.has_template() && request_.resume_from() > 0) {
      return absl::InvalidArgumentError("--template and --resume-from exclude each other: send what was sent before");
    }
    if (!request_.request_id().empty() && request_.session_id().empty()) {
      return absl::InvalidArgumentError("--request-id needs --session: only a session's turns can be named");
    }
    return absl::OkStatus();
  }

  absl::Status Run(Context& context) override {
    request_.set_ignore_end_of_text(ignore_end_of_text_);
    // A turn with a name survives a lost connection.
    if (!request_.session_id().empty() && request_.request_id().empty()) request_.set_request_id(MakeRequestId());
    absl::StatusOr<InputFlags::Input> input = input_.Read(context.in);
    if (!input.ok()) return input.status();
    bool print_ids = false;
    absl::optional<ChatPrompt::Answer> answer;
    if (prompt_.has_template()) {
      if (!input->is_text || !input_.has_input()) {
        return absl::InvalidArgumentError("--template needs --prompt TEXT");
      }
      if (absl::Status status = prompt_.Choose(*context.client, request_.model()); !status.ok()) return status;
      if (absl::Status status = prompt_.AddTurn(*context.client, input->text, &request_); !status.ok()) return status;
      answer.emplace(prompt_.MakeAnswer());
    } else if (!input->is_text) {
      *request_.mutable_tokens() = std::move(input->tokens);
    } else if (!input->text.empty() || request_.session_id().empty()) {
      request_.set_text(std::move(input->text));
    }
    if (!request_.has_text() && !prompt_.has_template() && !json_) {
      absl::StatusOr<bool> has_tokenizer = HasTokenizer(*context.client);
      if (!has_tokenizer.ok()) return has_tokenizer.status();
      print_ids = !*has_tokenizer;
    }

    bool any = false;
    bool line_open = false;
    absl::Status status = context.client->Generate(request_, [&](const v1::GenerateResponse& response) {
      if (json_) {
        context.out << DumpLine(response.has_finish() ? FinishToJson(response) : TokenToJson(response));
      } else if (print_ids) {
        if (response.has_token_id()) context.out << (any ? " " : "") << response.token_id();
        if (response.has_finish()) context.out << "\n";
      } else {
        const std::string text = answer.has_value() ? answer->Push(response.text()) : response.text();
        context.out << text;
        if (!text.empty()) line_open = text.back() != '\n';
      }
      any = true;
      return FlushOutput(context.out);
    });
    // What is piped on is the answer and nothing else; a terminal's prompt starts on a line of its own.
    if (line_open && context.out_is_terminal) context.out << "\n";
    return status;
  }

 private:
  absl::StatusOr<bool> HasTokenizer(router::RouterClient& client) const {
    absl::StatusOr<v1::ListModelsResponse> models = client.ListModels();
    if (!models.ok()) return models.status();
    for (const v1::ModelInfo& model : models->models()) {
      if (request_.model().empty() || request_.model() == model.name() || request_.model() == model.fingerprint()) {
        return !model.tokenizer().empty();
      }
    }
    return true;  // Generate will say what is wrong.
  }

  InputFlags input_;
  ChatPrompt prompt_;
  v1::GenerateRequest request_;
  bool ignore_end_of_text_ = false;
  bool json_ = false;
};

}  // namespace

std::unique_ptr<Command> MakeGenerateCommand() { return std::make_unique<GenerateCommand>(); }

std::string MakeRequestId() {
  absl::BitGen bits;
  return absl::StrFormat("%016x%016x", absl::Uniform<uint64_t>(bits), absl::Uniform<uint64_t>(bits));
}

}  // namespace rwkv::rwkvctl
