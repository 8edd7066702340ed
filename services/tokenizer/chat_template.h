// How a conversation is written for the models that were trained on it. RWKV has no control tokens: a template is plain
// text, and a model that reads another one answers worse, so every blank and line end counts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace rwkv::tokenizer {

enum class ChatRole { kSystem, kUser, kAssistant };

struct ChatMessage {
  ChatRole role = ChatRole::kUser;
  std::string text;  // Written as CleanChatText() leaves it.
};

// Whether the answer begins with a thought.
enum class Thinking {
  kAuto,  // The prompt does not say; models answer at once.
  kOn,    // The prompt opens the thought.
  kOff,   // The prompt has an empty thought, so that none follows.
};

// A turn is
//   user gap text "\n\n" assistant gap text
// where the gap behind a label is " " or "\n". Between turns stands "\n\n". A prompt ends with the label of the answer,
// without the blank: models were trained on tokens that begin with it.
struct ChatTemplate {
  absl::string_view name;
  absl::string_view description;  // For people, on one line.
  absl::string_view preamble;     // Before the first turn of a session.
  absl::string_view preamble_with_system;
  absl::string_view system;            // The label of the system's text; empty: it has none.
  absl::string_view user;              // Of what the user says.
  absl::string_view user_with_system;  // The same, in a turn that begins with the system's text.
  absl::string_view assistant;
  char gap = ' ';
  absl::string_view stop;         // Ends an answer.
  bool end_of_text_first = true;  // A session begins with kEndOfText, as every document did in training.
  bool thinks = false;            // Knows Thinking.
};

constexpr uint32_t kEndOfText = 0;  // Of every RWKV vocabulary.

// All of them, the default of World models first.
absl::Span<const ChatTemplate> ChatTemplates();

// Null: no template has this name.
const ChatTemplate* FindChatTemplate(absl::string_view name);

// The template of a model, from what is known of it; all may be empty. `said`: v1::ModelInfo.chat_template, a
// template's name or what files have instead of one. `model`: its name; BlinkDL's say "raven" or "g1". `tokenizer`:
// "world", "neox".
const ChatTemplate& ChooseChatTemplate(absl::string_view said, absl::string_view model, absl::string_view tokenizer);

// A message that cannot be taken for the template's own text: CR LF and CR become LF, blanks at line ends and empty
// lines go ("\n\n" ends a turn), and so does white space at both ends.
std::string CleanChatText(absl::string_view text);

// The prompt of a whole conversation in a fresh session, up to where the answer begins. The first message may be the
// system's; the last is the user's. kInvalidArgument: they are not, a message is empty (cleaned), or `thinking` is kOn
// and the template knows none.
absl::StatusOr<std::string> StartChat(const ChatTemplate& chat, absl::Span<const ChatMessage> messages,
                                      Thinking thinking);

// The prompt of one more turn of a session whose text ends with `session_end`, of which the last 64 bytes suffice. It
// adds what the session lacks: an answer may have ended anywhere, also with a stop string in it. Errors as above.
absl::StatusOr<std::string> ContinueChat(const ChatTemplate& chat, absl::string_view session_end,
                                         absl::string_view message, Thinking thinking);

// What the prompt has of the answer already: " <think", say. Empty for kAuto.
absl::string_view AnswerBeginning(Thinking thinking);

}  // namespace rwkv::tokenizer
