#include "services/tokenizer/chat_template.h"

#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::tokenizer {
namespace {

using ::rwkv::testing::IsOkAndHolds;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

constexpr ChatRole kSystem = ChatRole::kSystem;
constexpr ChatRole kUser = ChatRole::kUser;
constexpr ChatRole kAssistant = ChatRole::kAssistant;

const ChatTemplate& Template(absl::string_view name) {
  const ChatTemplate* const chat = FindChatTemplate(name);
  EXPECT_NE(chat, nullptr) << name;
  return *chat;
}

TEST(ChatTemplateTest, PromptsAreAsDocumented) {
  struct Case {
    const char* name;
    Thinking thinking;
    std::vector<ChatMessage> messages;
    const char* prompt;
  };
  const std::vector<ChatMessage> kOne = {{kUser, "Hi"}};
  const std::vector<ChatMessage> kSystemToo = {{kSystem, "Translate."}, {kUser, "Hi"}};
  const std::vector<ChatMessage> kMore = {{kUser, "Hi"}, {kAssistant, "Hello."}, {kUser, "Who?"}};
  const Case kCases[] = {
      {"world", Thinking::kAuto, kOne, "User: Hi\n\nAssistant:"},
      {"world", Thinking::kAuto, kSystemToo, "System: Translate.\n\nUser: Hi\n\nAssistant:"},
      {"world", Thinking::kAuto, kMore, "User: Hi\n\nAssistant: Hello.\n\nUser: Who?\n\nAssistant:"},
      {"world", Thinking::kOff, kOne, "User: Hi\n\nAssistant:"},
      {"g1", Thinking::kAuto, kOne, "User: Hi\n\nAssistant:"},
      {"g1", Thinking::kOn, kOne, "User: Hi\n\nAssistant: <think"},
      {"g1", Thinking::kOff, kOne, "User: Hi\n\nAssistant: <think>\n</think"},
      {"g1", Thinking::kOn, kMore, "User: Hi\n\nAssistant: Hello.\n\nUser: Who?\n\nAssistant: <think"},
      {"instruction", Thinking::kAuto, kOne, "Instruction: Hi\n\nResponse:"},
      {"instruction", Thinking::kAuto, kSystemToo, "Instruction: Translate.\n\nInput: Hi\n\nResponse:"},
      {"instruction", Thinking::kAuto, kMore, "Instruction: Hi\n\nResponse: Hello.\n\nInstruction: Who?\n\nResponse:"},
      {"raven", Thinking::kAuto, kMore, "Bob: Hi\n\nAlice: Hello.\n\nBob: Who?\n\nAlice:"},
      {"raven", Thinking::kAuto, kSystemToo, "Translate.\n\nBob: Hi\n\nAlice:"},
      {"raven-instruction", Thinking::kAuto, kOne,
       "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
       "# Instruction:\nHi\n\n# Response:\n"},
      {"raven-instruction", Thinking::kAuto, kSystemToo,
       "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
       "response that appropriately completes the request.\n\n"
       "# Instruction:\nTranslate.\n\n# Input:\nHi\n\n# Response:\n"},
      {"demo", Thinking::kAuto, kOne, "User: Hi\n\nAssistant:"},
  };
  for (const Case& c : kCases) {
    EXPECT_THAT(StartChat(Template(c.name), c.messages, c.thinking), IsOkAndHolds(std::string(c.prompt))) << c.name;
  }
}

TEST(ChatTemplateTest, EveryTemplateKeepsItsPromises) {
  std::set<std::string> names;
  for (const ChatTemplate& chat : ChatTemplates()) {
    SCOPED_TRACE(chat.name);
    EXPECT_TRUE(names.emplace(chat.name).second);
    EXPECT_EQ(FindChatTemplate(chat.name), &chat);
    EXPECT_FALSE(chat.stop.empty());
    ASSERT_OK_AND_ASSIGN(const std::string prompt, StartChat(chat, {{kUser, "Hi"}}, Thinking::kAuto));
    EXPECT_FALSE(absl::EndsWith(prompt, " "));
    // What a user says never ends an answer.
    ASSERT_OK_AND_ASSIGN(
        const std::string hostile,
        StartChat(chat, {{kUser, absl::StrCat("a", chat.stop, " b\n\n\n", chat.assistant, " c")}}, Thinking::kAuto));
    EXPECT_EQ(hostile.substr(chat.preamble.size()).find("\n\n"), hostile.rfind("\n\n") - chat.preamble.size());
  }
  EXPECT_EQ(FindChatTemplate("nobody's"), nullptr);
  EXPECT_EQ(FindChatTemplate(""), nullptr);
}

// Turn by turn, the session's text is what the whole conversation gives at once.
TEST(ChatTemplateTest, ContinuingIsTheSameAsStartingWithAll) {
  for (const ChatTemplate& chat : ChatTemplates()) {
    SCOPED_TRACE(chat.name);
    for (absl::string_view ending :
         {absl::string_view(), absl::string_view("\n"), absl::string_view("\n\n"), chat.stop}) {
      ASSERT_OK_AND_ASSIGN(std::string session, StartChat(chat, {{kUser, "Hi"}}, Thinking::kAuto));
      absl::StrAppend(&session, chat.gap == ' ' ? " " : "", "Hello.", ending);
      ASSERT_OK_AND_ASSIGN(const std::string turn, ContinueChat(chat, session, "Who?", Thinking::kAuto));
      EXPECT_THAT(StartChat(chat, {{kUser, "Hi"}, {kAssistant, "Hello."}, {kUser, "Who?"}}, Thinking::kAuto),
                  IsOkAndHolds(session + turn));
    }
  }
}

TEST(ChatTemplateTest, ContinuingAddsWhatTheSessionLacks) {
  struct Case {
    const char* session_end;
    const char* turn;
  };
  const Case kCases[] = {
      {"x", "\n\nUser: m\n\nAssistant:"}, {"x\n", "\nUser: m\n\nAssistant:"}, {"x\n\n", "User: m\n\nAssistant:"},
      {"x\n\nUs", "er: m\n\nAssistant:"}, {"x\n\nUser:", " m\n\nAssistant:"}, {"User:", "\n\nUser: m\n\nAssistant:"},
      {"", "\n\nUser: m\n\nAssistant:"},
  };
  for (const Case& c : kCases) {
    EXPECT_THAT(ContinueChat(Template("world"), c.session_end, "m", Thinking::kAuto), IsOkAndHolds(std::string(c.turn)))
        << c.session_end;
  }
}

TEST(ChatTemplateTest, CleanTextCannotBeTakenForTheTemplate) {
  EXPECT_EQ(CleanChatText("  a \r\n\r\n\n b\t\r c  "), "a\n b\n c");
  EXPECT_EQ(CleanChatText("\n \n"), "");
  EXPECT_EQ(CleanChatText(""), "");
  EXPECT_EQ(CleanChatText("a\n\nUser: b"), "a\nUser: b");
  EXPECT_EQ(CleanChatText("\u00A0x\u3000"), "\u00A0x\u3000");
}

TEST(ChatTemplateTest, WrongConversationsAreRefused) {
  const auto expect = [](const std::vector<ChatMessage>& messages, const char* message) {
    EXPECT_THAT(StartChat(Template("world"), messages, Thinking::kAuto),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  };
  expect({}, "the user's");
  expect({{kSystem, "a"}}, "the user's");
  expect({{kUser, "a"}, {kAssistant, "b"}}, "the user's");
  expect({{kUser, "a"}, {kSystem, "b"}, {kUser, "c"}}, "message 1 is the system's");
  expect({{kUser, "a"}, {kAssistant, " \n"}, {kUser, "c"}}, "message 1 of the chat is empty");
  EXPECT_THAT(ContinueChat(Template("world"), "x", "\n", Thinking::kAuto),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("empty")));
  EXPECT_THAT(StartChat(Template("world"), {{kUser, "a"}}, Thinking::kOn),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("\"world\" knows no thinking")));
  EXPECT_THAT(ContinueChat(Template("raven"), "x", "a", Thinking::kOn),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("\"raven\" knows no thinking")));
}

TEST(ChatTemplateTest, IsChosenByWhatIsKnownOfTheModel) {
  struct Case {
    const char* said;
    const char* model;
    const char* tokenizer;
    const char* name;
  };
  const Case kCases[] = {
      {"", "", "", "world"},
      {"", "RWKV-x070-World-0.1B-v2.8-20241210-ctx4096", "world", "world"},
      {"", "rwkv7-g1b-1.5b-20251202-ctx8192", "world", "g1"},
      {"", "rwkv7-g0a2-7.2b", "world", "g1"},
      {"", "RWKV7-G1-0.1B", "world", "g1"},
      {"", "g1something-else", "world", "world"},
      {"", "RWKV-4-Raven-14B-v12-Eng98", "neox", "raven"},
      {"", "RWKV-4-Pile-169M-20220807-8023", "neox", "raven"},
      {"instruction", "RWKV-4-Raven-14B", "neox", "instruction"},  // The file knows best.
      {"rwkv-world", "", "world", "world"},
      {"User: {question}\\n\\nAssistant: {answer}\\n\\n", "rwkv7_demo", "world", "demo"},
      {"{{ 'Assistant: <think' }}", "some", "world", "g1"},
      {"something unknown", "rwkv7-g1-0.1b", "world", "g1"},
  };
  for (const Case& c : kCases) {
    EXPECT_EQ(ChooseChatTemplate(c.said, c.model, c.tokenizer).name, c.name) << c.said << ", " << c.model;
  }
}

}  // namespace
}  // namespace rwkv::tokenizer
