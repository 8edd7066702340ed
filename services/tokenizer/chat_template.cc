#include "services/tokenizer/chat_template.h"

#include <algorithm>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"

namespace rwkv::tokenizer {
namespace {

constexpr absl::string_view kTurnEnd = "\n\n";

// Sources: BlinkDL/ChatRWKV, README.md ("The best chat format"), API_DEMO_CHAT.py, v2/chat.py ("+i"); the model cards
// of BlinkDL/rwkv-7-world and BlinkDL/rwkv7-g1; wiki.rwkv.com, RWKV-Prompts/prompt-guidelines.
const ChatTemplate kTemplates[] = {
    {"world", "User and Assistant, of World models", "", "", "System:", "User:", "User:", "Assistant:", ' ',
     "\n\nUser:"},
    {"g1", "User and Assistant, of G0 and G1 models, which may think first", "", "",
     "System:", "User:", "User:", "Assistant:", ' ', "\n\nUser:", /*end_of_text_first=*/true, /*thinks=*/true},
    {"instruction", "Instruction, Input and Response, of World models", "", "",
     "Instruction:", "Instruction:", "Input:", "Response:", ' ', "\n\nInstruction:"},
    {"raven", "Bob and Alice, of Raven models", "", "", "", "Bob:", "Bob:", "Alice:", ' ', "\n\nBob:",
     /*end_of_text_first=*/false},
    {"raven-instruction", "the Alpaca form, of Raven models",
     "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
     "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
     "response that appropriately completes the request.\n\n",
     "# Instruction:", "# Instruction:", "# Input:", "# Response:", '\n', "\n\n# Instruction:",
     /*end_of_text_first=*/false},
    // Its answers are one paragraph each.
    {"demo", "User and Assistant, of the demo model", "", "", "System:", "User:", "User:", "Assistant:", ' ', "\n\n"},
};

const ChatTemplate& Get(absl::string_view name) { return *FindChatTemplate(name); }

absl::Status CheckThinking(const ChatTemplate& chat, Thinking thinking) {
  if (thinking != Thinking::kOn || chat.thinks) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("the chat template \"", chat.name, "\" knows no thinking"));
}

// `label` and `text`, or `text` alone where there is no label.
void AppendText(const ChatTemplate& chat, absl::string_view label, absl::string_view text, std::string& prompt) {
  if (!label.empty()) absl::StrAppend(&prompt, label, std::string(1, chat.gap));
  absl::StrAppend(&prompt, text);
}

// Where the answer begins.
void AppendAnswer(const ChatTemplate& chat, Thinking thinking, std::string& prompt) {
  absl::StrAppend(&prompt, kTurnEnd, chat.assistant, chat.gap == '\n' ? "\n" : "");
  if (chat.thinks) absl::StrAppend(&prompt, AnswerBeginning(thinking));
}

}  // namespace

absl::Span<const ChatTemplate> ChatTemplates() { return kTemplates; }

const ChatTemplate* FindChatTemplate(absl::string_view name) {
  const auto* const found = std::find_if(std::begin(kTemplates), std::end(kTemplates),
                                         [&](const ChatTemplate& chat) { return chat.name == name; });
  return found == std::end(kTemplates) ? nullptr : found;
}

const ChatTemplate& ChooseChatTemplate(absl::string_view said, absl::string_view model, absl::string_view tokenizer) {
  if (const ChatTemplate* const chat = FindChatTemplate(said); chat != nullptr) return *chat;
  if (said == "rwkv-world") return Get("world");  // llama.cpp's name, in GGUF files.
  // deploy/demo_model/train.py
  if (said == "User: {question}\\n\\nAssistant: {answer}\\n\\n") return Get("demo");
  if (absl::StrContains(said, "<think")) return Get("g1");  // A program that writes one, of Hugging Face.
  // RWKV-4-Raven-14B-v12-...; rwkv7-g1a2-1.5b-...
  const std::string name = absl::AsciiStrToLower(model);
  for (absl::string_view part : absl::StrSplit(name, absl::ByAnyChar("-_. "))) {
    if (part == "raven") return Get("raven");
    if ((absl::StartsWith(part, "g0") || absl::StartsWith(part, "g1")) && part.size() <= 4) return Get("g1");
  }
  return Get(tokenizer == "neox" ? "raven" : "world");
}

std::string CleanChatText(absl::string_view text) {
  std::string clean;
  const std::string normalized = absl::StrReplaceAll(text, {{"\r\n", "\n"}, {"\r", "\n"}});
  for (absl::string_view line : absl::StrSplit(normalized, '\n')) {
    line = absl::StripTrailingAsciiWhitespace(line);
    if (!line.empty()) absl::StrAppend(&clean, clean.empty() ? "" : "\n", line);
  }
  return std::string(absl::StripLeadingAsciiWhitespace(clean));
}

absl::StatusOr<std::string> StartChat(const ChatTemplate& chat, absl::Span<const ChatMessage> messages,
                                      Thinking thinking) {
  if (absl::Status status = CheckThinking(chat, thinking); !status.ok()) return status;
  if (messages.empty() || messages.back().role != ChatRole::kUser) {
    return absl::InvalidArgumentError("the last message of a chat has to be the user's");
  }
  const bool has_system = messages.front().role == ChatRole::kSystem;
  std::string prompt(has_system ? chat.preamble_with_system : chat.preamble);
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    const std::string text = CleanChatText(message.text);
    if (text.empty()) return absl::InvalidArgumentError(absl::StrCat("message ", i, " of the chat is empty"));
    if (i > 0) absl::StrAppend(&prompt, kTurnEnd);
    switch (message.role) {
      case ChatRole::kSystem:
        if (i > 0)
          return absl::InvalidArgumentError(absl::StrCat("message ", i, " is the system's, but not the first"));
        AppendText(chat, chat.system, text, prompt);
        break;
      case ChatRole::kUser:
        AppendText(chat, has_system && i == 1 ? chat.user_with_system : chat.user, text, prompt);
        break;
      case ChatRole::kAssistant:
        AppendText(chat, chat.assistant, text, prompt);
        break;
    }
  }
  AppendAnswer(chat, thinking, prompt);
  return prompt;
}

absl::StatusOr<std::string> ContinueChat(const ChatTemplate& chat, absl::string_view session_end,
                                         absl::string_view message, Thinking thinking) {
  if (absl::Status status = CheckThinking(chat, thinking); !status.ok()) return status;
  const std::string text = CleanChatText(message);
  if (text.empty()) return absl::InvalidArgumentError("the message is empty");
  const std::string opening = absl::StrCat(kTurnEnd, chat.user);
  // The longest beginning of it that is there already.
  size_t length = std::min(opening.size(), session_end.size());
  while (!absl::EndsWith(session_end, absl::string_view(opening).substr(0, length))) --length;
  std::string prompt = absl::StrCat(opening.substr(length), std::string(1, chat.gap), text);
  AppendAnswer(chat, thinking, prompt);
  return prompt;
}

absl::string_view AnswerBeginning(Thinking thinking) {
  switch (thinking) {
    case Thinking::kAuto:
      return "";
    case Thinking::kOn:
      return " <think";
    case Thinking::kOff:
      return " <think>\n</think";
  }
  return "";
}

}  // namespace rwkv::tokenizer
