#include "services/rwkvctl/chat_command.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/types/optional.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/client/cancellation.h"
#include "services/rwkvctl/generate_command.h"
#include "services/rwkvctl/input.h"
#include "services/rwkvctl/sampling_flags.h"

namespace rwkv::rwkvctl {
namespace {

constexpr absl::string_view kUser = "\n\nUser:";
constexpr absl::string_view kAssistant = "\n\nAssistant:";
constexpr absl::string_view kBlock = "\"\"\"";  // Opens and closes a message of several lines.

// Ctrl-C cancels `cancellation` while this lives.
class InterruptScope {
 public:
  InterruptScope(Interrupts& interrupts, router::Cancellation& cancellation) : interrupts_(interrupts) {
    interrupts_.SetHandler([&cancellation] { cancellation.Cancel(); });
  }
  ~InterruptScope() { interrupts_.SetHandler(nullptr); }
  InterruptScope(const InterruptScope&) = delete;
  InterruptScope& operator=(const InterruptScope&) = delete;

 private:
  Interrupts& interrupts_;
};

class ChatCommand : public Command {
 public:
  absl::string_view name() const override { return "chat"; }
  absl::string_view summary() const override { return "talks with the model; the session is kept"; }
  absl::string_view details() const override {
    return "One line is one message; a line of \"\"\" opens and closes a message of several lines. Ctrl-C ends the "
           "answer, not\n"
           "the session; Ctrl-D or /exit ends the chat, and --session goes on with it later. The template is\n"
           "\"User: ...\\n\\nAssistant:\".\n";
  }

  void AddFlags(FlagSet& flags) override {
    sampling_.set_temperature(1);
    sampling_.set_top_p(0.5f);
    sampling_.set_presence_penalty(0.4f);
    sampling_.set_frequency_penalty(0.4f);
    const auto set = [](std::string* field) {
      return [field](const std::string& value) {
        *field = value;
        return absl::OkStatus();
      };
    };
    flags.AddString("session", "ID", "go on with this session (default: a new one)", set(&session_id_));
    flags.AddString("model", "NAME", "name or fingerprint (default: the model that is served)", set(&model_));
    flags.AddUint32("max-tokens", "of an answer (default 1024)", [this](uint32_t value) { max_tokens_ = value; });
    AddSamplingFlags(flags, &sampling_);
    flags.AddString("stop", "TEXT", "end an answer before this text; may be given often (default \"\\n\\nUser:\")",
                    [this](const std::string& value) {
                      stops_.push_back(value);
                      return CheckUtf8(value);
                    });
  }

  absl::Status Check(const std::vector<std::string>& positional) override { return CheckNoArguments(positional); }

  absl::Status Run(Context& context) override {
    if (stops_.empty()) stops_.emplace_back(kUser);
    if (session_id_.empty()) {
      absl::StatusOr<v1::Session> session = context.client.CreateSession(v1::SessionsCreateRequest());
      if (!session.ok()) return session.status();
      session_id_ = session->id();
      context.err << "session " << session_id_ << std::endl;
    } else if (absl::StatusOr<std::string> end = SessionEnd(context.client); !end.ok()) {
      return end.status();
    }
    if (context.in_is_terminal) context.err << "/exit or Ctrl-D ends, Ctrl-C stops an answer" << std::endl;

    for (;;) {
      absl::optional<std::string> message = ReadMessage(context);
      if (!message.has_value()) break;
      const std::string clean = CleanMessage(*message);
      if (clean.empty()) continue;
      if (clean == "/exit" || clean == "/quit") break;
      if (absl::Status status = CheckUtf8(clean); !status.ok()) {
        context.err << "rwkvctl: " << status.message() << std::endl;
        continue;
      }
      const absl::Status status = Answer(context, clean);
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
  // The text of the session's last tokens: enough of them to see how the last turn ended.
  absl::StatusOr<std::string> SessionEnd(router::RouterClient& client) const {
    constexpr uint32_t kTokens = 16;
    v1::SessionsGetRequest request;
    request.set_session_id(session_id_);
    absl::StatusOr<v1::SessionsGetResponse> session = client.GetSession(request);
    if (!session.ok()) return session.status();
    const uint64_t count = session->session().token_count();
    if (count == 0) return std::string();
    request.set_tokens_begin(count - std::min<uint64_t>(count, kTokens));
    request.set_tokens_count(kTokens);
    session = client.GetSession(request);
    if (!session.ok()) return session.status();
    // A session whose last tokens have no text is not at its start all the same.
    return session->text().empty() ? std::string("?") : session->text();
  }

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

  absl::Status Answer(Context& context, const std::string& message) const {
    router::Cancellation cancellation;
    InterruptScope scope(context.interrupts, cancellation);
    absl::StatusOr<std::string> end = SessionEnd(context.client);
    if (!end.ok()) return end.status();

    v1::GenerateRequest request;
    request.set_model(model_);
    request.set_session_id(session_id_);
    request.set_request_id(MakeRequestId());
    request.set_text(MakeTurn(*end, message));
    request.set_max_tokens(max_tokens_);
    *request.mutable_sampling() = sampling_;
    for (const std::string& stop : stops_) request.add_stop(stop);

    if (context.out_is_terminal) context.out << "Assistant:" << std::flush;
    bool started = false;
    // A turn that was just cancelled may still hold the session for a moment.
    constexpr int kMaxAttempts = 50;
    for (int attempt = 1;; ++attempt) {
      absl::Status status = context.client.Generate(
          request,
          [&](const v1::GenerateResponse& response) {
            absl::string_view text = response.text();
            // The model begins with a blank, which belongs to the template.
            if (!started && !context.out_is_terminal) text = absl::StripLeadingAsciiWhitespace(text);
            started = started || !text.empty();
            context.out << text;
            return FlushOutput(context.out);
          },
          &cancellation);
      const absl::optional<absl::Duration> delay = common::GetRetryDelay(status);
      if (!absl::IsAborted(status) || !delay.has_value() || started || attempt == kMaxAttempts) return status;
      constexpr absl::Duration kMaxDelay = absl::Seconds(1);
      if (cancellation.WaitFor(std::min(*delay, kMaxDelay))) return absl::CancelledError("cancelled");
    }
  }

  std::string session_id_;
  std::string model_;
  uint32_t max_tokens_ = 1024;
  v1::Sampling sampling_;
  std::vector<std::string> stops_;
};

}  // namespace

std::unique_ptr<Command> MakeChatCommand() { return std::make_unique<ChatCommand>(); }

std::string CleanMessage(absl::string_view message) {
  std::vector<std::string> lines;
  const std::string normalized = absl::StrReplaceAll(message, {{"\r\n", "\n"}, {"\r", "\n"}});
  for (absl::string_view line : absl::StrSplit(normalized, '\n')) {
    line = absl::StripTrailingAsciiWhitespace(line);
    if (!line.empty()) lines.emplace_back(line);
  }
  std::string clean;
  for (const std::string& line : lines) absl::StrAppend(&clean, clean.empty() ? "" : "\n", line);
  return std::string(absl::StripAsciiWhitespace(clean));
}

std::string MakeTurn(absl::string_view session_end, absl::string_view message) {
  absl::string_view missing = kUser;
  if (session_end.empty()) {
    missing.remove_prefix(2);  // Nothing to be parted from.
  } else {
    // The longest beginning of "\n\nUser:" that is there already.
    size_t length = std::min(kUser.size(), session_end.size());
    while (!absl::EndsWith(session_end, kUser.substr(0, length))) --length;
    missing.remove_prefix(length);
  }
  return absl::StrCat(missing, " ", message, kAssistant);
}

}  // namespace rwkv::rwkvctl
