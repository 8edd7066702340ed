#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "services/tokenizer/chat_template.h"

namespace rwkv::tokenizer {
namespace {

void Require(bool condition) {
  if (!condition) abort();
}

void Check(const ChatTemplate& chat, absl::Span<const ChatMessage> messages, Thinking thinking) {
  const absl::StatusOr<std::string> prompt = StartChat(chat, messages, thinking);
  if (!prompt.ok()) return;
  Require(!absl::EndsWith(*prompt, " "));
  // Only the template itself parts turns: once before each message but the first, and before the answer.
  size_t ends = 0;
  const size_t begin = messages[0].role == ChatRole::kSystem ? chat.preamble_with_system.size() : chat.preamble.size();
  for (size_t at = prompt->find("\n\n", begin); at != std::string::npos; at = prompt->find("\n\n", at + 1)) ++ends;
  Require(ends == messages.size());
  const absl::StatusOr<std::string> turn = ContinueChat(chat, *prompt, messages.back().text, thinking);
  Require(turn.ok());
  Require(absl::StrContains(*prompt + *turn, absl::StrCat("\n\n", chat.user, std::string(1, chat.gap),
                                                          CleanChatText(messages.back().text), "\n\n")));
}

}  // namespace
}  // namespace rwkv::tokenizer

// The input as a conversation: messages between NULs, their roles by their first byte; and as what a file says of its
// template.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace rwkv::tokenizer;
  const absl::string_view input(reinterpret_cast<const char*>(data), size);
  const std::string clean = CleanChatText(input);
  Require(CleanChatText(clean) == clean);
  Require(!absl::StrContains(clean, "\n\n") && !absl::StrContains(clean, "\r"));
  std::vector<ChatMessage> messages;
  for (absl::string_view text : absl::StrSplit(input, '\0')) {
    const ChatRole role = absl::StartsWith(text, "S")   ? ChatRole::kSystem
                          : absl::StartsWith(text, "A") ? ChatRole::kAssistant
                                                        : ChatRole::kUser;
    messages.push_back({role, std::string(text)});
  }
  for (const ChatTemplate& chat : ChatTemplates()) {
    for (Thinking thinking : {Thinking::kAuto, Thinking::kOn, Thinking::kOff}) Check(chat, messages, thinking);
  }
  Require(FindChatTemplate(ChooseChatTemplate(input, input, input).name) != nullptr);
  return 0;
}
