// What a user says, in the chat template of the model: for `chat` and `generate --template`.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "rwkv/v1/generation.pb.h"
#include "services/router/client/router_client.h"
#include "services/rwkvctl/flag_set.h"
#include "services/tokenizer/chat_template.h"

namespace rwkv::rwkvctl {

class ChatPrompt {
 public:
  // --template, --system, --think.
  void AddFlags(FlagSet& flags);

  bool has_template() const { return !name_.empty(); }  // --template was given.
  absl::Status CheckNeedsTemplate() const;              // kInvalidArgument: another of the flags was given without it.

  // Chooses the template: --template, or what is known of the model. `model`: as in v1::GenerateRequest.
  absl::Status Choose(router::RouterClient& client, const std::string& model);
  const tokenizer::ChatTemplate& chat() const { return *chat_; }  // After Choose().

  // Sets the request's input to one more turn of its session, or to the first of a fresh one, and the template's stop
  // string where the request has none. kInvalidArgument: the message is empty, the template knows no thinking, or
  // --system was given for a session that has begun without it.
  absl::Status AddTurn(router::RouterClient& client, absl::string_view message, v1::GenerateRequest* request);

  // Makes of the pieces that a turn streams the answer as it is to be read: without the blanks before it, and with the
  // beginning of a thought that the prompt has already.
  class Answer {
   public:
    explicit Answer(tokenizer::Thinking thinking) : thinking_(thinking) {}
    std::string Push(absl::string_view piece);

   private:
    const tokenizer::Thinking thinking_;
    bool closed_ = false;   // Of an empty thought: its last ">" came.
    bool started_ = false;  // Something was shown.
  };
  Answer MakeAnswer() const { return Answer(chat_->thinks ? thinking_ : tokenizer::Thinking::kAuto); }

 private:
  // The text of the session's last tokens: enough of them to see how the last turn ended. Empty: it has none.
  absl::StatusOr<std::string> SessionEnd(router::RouterClient& client, const std::string& session_id) const;

  std::string name_;
  std::string system_;
  tokenizer::Thinking thinking_ = tokenizer::Thinking::kAuto;
  const tokenizer::ChatTemplate* chat_ = nullptr;
  bool began_ = false;  // A session, with the system's text.
};

}  // namespace rwkv::rwkvctl
