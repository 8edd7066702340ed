#include "services/rwkvctl/chat_command.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/client/cancellation.h"
#include "services/rwkvctl/chat_prompt.h"
#include "services/rwkvctl/generate_command.h"
#include "services/rwkvctl/input.h"
#include "services/rwkvctl/sampling_flags.h"
#include "services/tokenizer/chat_template.h"

namespace rwkv::rwkvctl {
namespace {

constexpr absl::string_view kBlock = "\"\"\"";  // Opens and closes a message of several lines.

class ChatCommand : public Command {
 public:
  absl::string_view name() const override { return "chat"; }
  absl::string_view summary() const override { return "talks with the model; the session is kept"; }
  absl::string_view details() const override {
    return "One line is one message; a line of \"\"\" opens and closes a message of several lines. Ctrl-C ends the "
           "answer, not\n"
           "the session; Ctrl-D or /exit ends the chat, and --session goes on with it later. /regenerate gives the "
           "last\n"
           "answer anew, /continue goes on with one that --max-tokens has cut off.\n";
  }

  void AddFlags(FlagSet& flags) override {
    sampling_.set_temperature(1);
    sampling_.set_top_p(0.5f);
    sampling_.set_presence_penalty(0.4f);
    sampling_.set_frequency_penalty(0.4f);
    flags.AddString("session", "ID", "go on with this session (default: a new one)", &session_id_);
    flags.AddString("initial-state", "NAME", "begin the new session with this tuned state (default: the model's own)",
                    create_.mutable_initial_state());
    flags.AddString("model", "NAME", "name or fingerprint (default: the model that is served)", &model_);
    flags.AddUint32("max-tokens", "of an answer (default 1024)", [this](uint32_t value) { max_tokens_ = value; });
    prompt_.AddFlags(flags);
    AddSamplingFlags(flags, &sampling_);
    flags.AddString("stop", "TEXT", "end an answer before this text; may be given often (default by the template)",
                    [this](const std::string& value) {
                      stops_.push_back(value);
                      return CheckUtf8(value);
                    });
  }

  absl::Status Check(const std::vector<std::string>& positional) override {
    if (!session_id_.empty() && !create_.initial_state().empty()) {
      return absl::InvalidArgumentError("--initial-state is for a new session; the one of --session has begun");
    }
    return CheckNoArguments(positional);
  }

  absl::Status Run(Context& context) override {
    if (absl::Status status = prompt_.Choose(*context.client, model_); !status.ok()) return status;
    if (session_id_.empty()) {
      absl::StatusOr<v1::Session> session = context.client->CreateSession(create_);
      if (!session.ok()) return session.status();
      session_id_ = session->id();
      context.err << "session " << session_id_ << std::endl;
    } else {
      v1::SessionsGetRequest request;
      request.set_session_id(session_id_);
      if (absl::Status status = context.client->GetSession(request).status(); !status.ok()) return status;
    }
    if (context.in_is_terminal) {
      context.err << "/exit or Ctrl-D ends, Ctrl-C stops an answer, /regenerate, /continue" << std::endl;
    }

    for (;;) {
      absl::optional<std::string> message = ReadMessage(context);
      if (!message.has_value()) break;
      const std::string clean = tokenizer::CleanChatText(*message);
      if (clean.empty()) continue;
      if (clean == "/exit" || clean == "/quit") break;
      if (absl::Status status = CheckUtf8(clean); !status.ok()) {
        context.err << "rwkvctl: " << status.message() << std::endl;
        continue;
      }
      const absl::Status status = clean == "/regenerate" ? Regenerate(context)
                                  : clean == "/continue" ? Continue(context)
                                                         : Say(context, clean);
      context.out << "\n";
      if (absl::Status flushed = FlushOutput(context.out); !flushed.ok()) return flushed;
      if (absl::IsCancelled(status)) {
        context.err << "[stopped]" << std::endl;
      } else if (!status.ok()) {
        // At a terminal the user may try again; a script should notice.
        if (!context.in_is_terminal) return status;
        context.err << "rwkvctl: " << absl::StatusCodeToString(status.code()) << ": " << status.message() << std::endl;
      }
    }
    if (context.in_is_terminal) context.err << "\nrwkvctl chat --session " << session_id_ << std::endl;
    return absl::OkStatus();
  }

 private:
  absl::optional<std::string> ReadMessage(Context& context) const {
    const auto prompt = [&](absl::string_view text) {
      if (context.in_is_terminal) context.err << text << std::flush;
    };
    prompt("User: ");
    std::string line;
    if (!std::getline(context.in, line)) return absl::nullopt;
    if (absl::StripAsciiWhitespace(line) != kBlock) return line;
    std::string message;
    for (prompt("... "); std::getline(context.in, line); prompt("... ")) {
      if (absl::StripAsciiWhitespace(line) == kBlock) break;
      absl::StrAppend(&message, line, "\n");
    }
    return message;
  }

  absl::Status Say(Context& context, const std::string& message) {
    v1::GenerateRequest request = MakeTurn();
    if (absl::Status status = prompt_.AddTurn(*context.client, message, &request); !status.ok()) return status;
    answer_begin_ = absl::nullopt;
    return Answer(context, request);
  }

  absl::Status Continue(Context& context) {
    v1::GenerateRequest request = MakeTurn();
    if (request.stop().empty()) request.add_stop(std::string(prompt_.chat().stop));
    return Answer(context, request);
  }

  // Back to before the answer, and on from there with another seed.
  absl::Status Regenerate(Context& context) {
    if (!answer_begin_.has_value()) {
      return absl::FailedPreconditionError("there is no whole answer of this chat to give anew");
    }
    v1::SessionsRewindRequest rewind;
    rewind.set_session_id(session_id_);
    rewind.set_position(*answer_begin_);
    if (absl::Status status = context.client->RewindSession(rewind).status(); !status.ok()) return status;
    if (sampling_.has_seed()) sampling_.set_seed(sampling_.seed() + 1);
    return Continue(context);
  }

  v1::GenerateRequest MakeTurn() const {
    v1::GenerateRequest request;
    request.set_model(model_);
    request.set_session_id(session_id_);
    request.set_request_id(MakeRequestId());
    request.set_max_tokens(max_tokens_);
    *request.mutable_sampling() = sampling_;
    for (const std::string& stop : stops_) request.add_stop(stop);
    return request;
  }

  absl::Status Answer(Context& context, const v1::GenerateRequest& request) {
    router::Cancellation cancellation;
    InterruptScope scope(context.interrupts, [&cancellation] { cancellation.Cancel(); });
    if (context.out_is_terminal) context.out << prompt_.chat().assistant << " " << std::flush;
    ChatPrompt::Answer answer = prompt_.MakeAnswer();
    bool started = false;
    // A turn that was just cancelled may still hold the session for a moment.
    constexpr int kMaxAttempts = 50;
    for (int attempt = 1;; ++attempt) {
      absl::Status status = context.client->Generate(
          request,
          [&](const v1::GenerateResponse& response) {
            started = started || !response.text().empty();
            context.out << answer.Push(response.text());
            if (response.has_finish() && !answer_begin_.has_value()) {
              answer_begin_ = response.finish().session_tokens() - response.finish().generated_tokens();
            }
            return FlushOutput(context.out);
          },
          &cancellation);
      const absl::optional<absl::Duration> delay = common::GetRetryDelay(status);
      if (!absl::IsAborted(status) || !delay.has_value() || started || attempt == kMaxAttempts) return status;
      constexpr absl::Duration kMaxDelay = absl::Seconds(1);
      if (cancellation.WaitFor(std::min(*delay, kMaxDelay))) return absl::CancelledError("cancelled");
    }
  }

  ChatPrompt prompt_;
  std::string session_id_;
  v1::SessionsCreateRequest create_;  // Unless there is a --session.
  std::string model_;
  uint32_t max_tokens_ = 1024;
  v1::Sampling sampling_;
  std::vector<std::string> stops_;
  absl::optional<uint64_t> answer_begin_;  // Of the last answer, whose continuations are part of it.
};

}  // namespace

std::unique_ptr<Command> MakeChatCommand() { return std::make_unique<ChatCommand>(); }

}  // namespace rwkv::rwkvctl
