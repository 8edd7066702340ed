#include "services/rwkvctl/chat_prompt.h"

#include <algorithm>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/rwkvctl/input.h"

namespace rwkv::rwkvctl {

using ::rwkv::tokenizer::ChatMessage;
using ::rwkv::tokenizer::ChatRole;
using ::rwkv::tokenizer::ChatTemplate;
using ::rwkv::tokenizer::Thinking;

void ChatPrompt::AddFlags(FlagSet& flags) {
  std::vector<std::string> names;
  for (const ChatTemplate& chat : tokenizer::ChatTemplates()) names.emplace_back(chat.name);
  const std::string all = absl::StrJoin(names, ", ");
  flags.AddString("template", "NAME", absl::StrCat("chat template: ", all, " (chat: default by the model)"),
                  [this, all](const std::string& value) -> absl::Status {
                    name_ = value;
                    if (tokenizer::FindChatTemplate(value) != nullptr) return absl::OkStatus();
                    return absl::InvalidArgumentError(absl::StrCat("no template \"", value, "\"; there are ", all));
                  });
  flags.AddString("system", "TEXT", "what stands before the first turn of a session", [this](const std::string& value) {
    system_ = value;
    return CheckUtf8(value);
  });
  flags.AddString("think", "on|off|auto", "whether the answer begins with a thought (default auto: the model decides)",
                  [this](const std::string& value) -> absl::Status {
                    if (value == "on") {
                      thinking_ = Thinking::kOn;
                    } else if (value == "off") {
                      thinking_ = Thinking::kOff;
                    } else if (value == "auto") {
                      thinking_ = Thinking::kAuto;
                    } else {
                      return absl::InvalidArgumentError(absl::StrCat("\"", value, "\" is none of on, off, auto"));
                    }
                    return absl::OkStatus();
                  });
}

absl::Status ChatPrompt::CheckNeedsTemplate() const {
  if (has_template() || (system_.empty() && thinking_ == Thinking::kAuto)) return absl::OkStatus();
  return absl::InvalidArgumentError("--system and --think need --template");
}

absl::Status ChatPrompt::Choose(router::RouterClient& client, const std::string& model) {
  chat_ = tokenizer::FindChatTemplate(name_);
  if (chat_ != nullptr) return absl::OkStatus();
  absl::StatusOr<v1::ListModelsResponse> models = client.ListModels();
  if (!models.ok()) return models.status();
  v1::ModelInfo info;  // Empty if there is none: Generate will say what is wrong.
  for (const v1::ModelInfo& served : models->models()) {
    if (model.empty() || model == served.name() || model == served.fingerprint()) info = served;
  }
  chat_ = &tokenizer::ChooseChatTemplate(info.chat_template(), info.name(), info.tokenizer());
  return absl::OkStatus();
}

absl::Status ChatPrompt::AddTurn(router::RouterClient& client, absl::string_view message,
                                 v1::GenerateRequest* request) {
  absl::StatusOr<std::string> end = SessionEnd(client, request->session_id());
  if (!end.ok()) return end.status();
  if (request->stop().empty()) request->add_stop(std::string(chat_->stop));
  request->set_plain_text(true);  // A message must not end the document.
  if (!end->empty()) {
    if (!system_.empty() && !began_) return absl::InvalidArgumentError("--system: the session has begun without it");
    absl::StatusOr<std::string> text = ContinueChat(*chat_, *end, message, thinking_);
    if (!text.ok()) return text.status();
    request->set_text(*std::move(text));
    return absl::OkStatus();
  }
  std::vector<ChatMessage> messages;
  if (!system_.empty()) messages.push_back({ChatRole::kSystem, system_});
  messages.push_back({ChatRole::kUser, std::string(message)});
  absl::StatusOr<std::string> text = StartChat(*chat_, messages, thinking_);
  if (!text.ok()) return text.status();
  began_ = true;
  if (!chat_->end_of_text_first) {
    request->set_text(*std::move(text));
    return absl::OkStatus();
  }
  v1::TokenizeRequest tokenize;
  tokenize.set_model(request->model());
  tokenize.set_data(*std::move(text));
  tokenize.set_plain_text(true);
  absl::StatusOr<v1::TokenizeResponse> tokens = client.Tokenize(tokenize);
  if (!tokens.ok()) return tokens.status();
  request->mutable_tokens()->add_ids(tokenizer::kEndOfText);
  request->mutable_tokens()->mutable_ids()->MergeFrom(tokens->token_ids());
  return absl::OkStatus();
}

absl::StatusOr<std::string> ChatPrompt::SessionEnd(router::RouterClient& client, const std::string& session_id) const {
  constexpr uint32_t kTokens = 16;
  if (session_id.empty()) return std::string();
  v1::SessionsGetRequest request;
  request.set_session_id(session_id);
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

std::string ChatPrompt::Answer::Push(absl::string_view piece) {
  if (started_) return std::string(piece);
  std::string text;
  if (thinking_ == Thinking::kOn) {
    // The thought goes on in the middle of its first word.
    text = std::string(absl::StripLeadingAsciiWhitespace(tokenizer::AnswerBeginning(thinking_)));
  } else {
    if (thinking_ == Thinking::kOff && !closed_) closed_ = absl::ConsumePrefix(&piece, ">");
    piece = absl::StripLeadingAsciiWhitespace(piece);
  }
  started_ = !piece.empty();
  return started_ ? absl::StrCat(text, piece) : "";
}

}  // namespace rwkv::rwkvctl
