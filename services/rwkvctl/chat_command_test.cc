// rwkvctl chat.
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/grpc_status.h"
#include "services/rwkvctl/rwkvctl_fixture.h"

namespace rwkv::rwkvctl {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;
using ::testing::StartsWith;

TEST_F(RwkvctlTest, ChatKeepsItsSessionAndItsTemplate) {
  router_.answer = " Hello.";
  EXPECT_EQ(Call({"chat"}, "Hi\n\nWho are you?\n/exit\nnot read\n"), 0);
  EXPECT_EQ(err_, "session session-1\n");
  EXPECT_EQ(out_, "Hello.\nHello.\n");
  ASSERT_THAT(router_.generate_requests, SizeIs(2));
  EXPECT_EQ(Fed(router_.generate_requests[0]), Begun("User: Hi\n\nAssistant:"));
  EXPECT_THAT(router_.generate_requests[0].stop(), ElementsAre("\n\nUser:"));
  EXPECT_TRUE(router_.tokenize_requests.back().plain_text() && router_.generate_requests[1].plain_text());
  // The fake left the stop string in the session, as the router does: only the rest is fed.
  EXPECT_EQ(router_.generate_requests[1].text(), " Who are you?\n\nAssistant:");
  EXPECT_EQ(router_.generate_requests[1].session_id(), "session-1");
  EXPECT_NE(router_.generate_requests[0].request_id(), router_.generate_requests[1].request_id());
  const std::vector<uint32_t>& log = router_.logs["session-1"];
  EXPECT_EQ(std::string(log.begin(), log.end()),
            Begun("User: Hi\n\nAssistant: Hello.\n\nUser: Who are you?\n\nAssistant: Hello.\n\nUser:"));
}

TEST_F(RwkvctlTest, ChatGoesOnWithASessionHoweverItEnded) {
  const std::string end = "User: Hi\n\nAssistant: cut in the mid";
  router_.logs["s"] = std::vector<uint32_t>(end.begin(), end.end());
  EXPECT_EQ(Call({"chat", "--session", "s"}, "More\n"), 0);
  EXPECT_EQ(request().text(), "\n\nUser: More\n\nAssistant:");
  EXPECT_EQ(Call({"chat", "--session", "nobody"}, "More\n"), 1);
  EXPECT_THAT(err_, HasSubstr("NOT_FOUND"));
}

TEST_F(RwkvctlTest, ChatTakesMessagesOfSeveralLines) {
  EXPECT_EQ(Call({"chat"}, "\"\"\"\nfirst\n\nsecond \r\n\"\"\"\n"), 0);
  EXPECT_EQ(Fed(request()), Begun("User: first\nsecond\n\nAssistant:"));
}

TEST_F(RwkvctlTest, ChatTakesTheModelsTemplateOrTheOneGiven) {
  router_.chat_template = "raven";
  EXPECT_EQ(Call({"chat"}, "Hi\n"), 0);
  EXPECT_EQ(request().text(), "Bob: Hi\n\nAlice:");  // Raven's sessions do not begin with the end of text.
  EXPECT_THAT(request().stop(), ElementsAre("\n\nBob:"));
  EXPECT_EQ(Call({"chat", "--template=instruction", "--system", "Translate.", "--stop=x"}, "Hi\nMore\n"), 0);
  EXPECT_EQ(Fed(router_.generate_requests[1]), Begun("Instruction: Translate.\n\nInput: Hi\n\nResponse:"));
  EXPECT_EQ(request().text(), "\n\nInstruction: More\n\nResponse:");
  EXPECT_THAT(request().stop(), ElementsAre("x"));
  router_.chat_template = "";
  router_.model_name = "rwkv7-g1a-0.1b-20250728-ctx4096";
  terminal_ = true;
  router_.answer = ">\nHm.</think>\nYes.";
  EXPECT_EQ(Call({"chat", "--think=on"}, "Hi\n"), 0);
  EXPECT_EQ(Fed(request()), Begun("User: Hi\n\nAssistant: <think"));
  EXPECT_EQ(out_, "Assistant: <think>\nHm.</think>\nYes.\n");
  terminal_ = false;
  router_.answer = ">\nYes.";
  EXPECT_EQ(Call({"chat", "--think=off"}, "Hi\n"), 0);
  EXPECT_EQ(Fed(request()), Begun("User: Hi\n\nAssistant: <think>\n</think"));
  EXPECT_EQ(out_, "Yes.\n");
}

TEST_F(RwkvctlTest, ChatRefusesWhatTheTemplateCannotDo) {
  EXPECT_EQ(Call({"chat", "--template=nobody's"}, "Hi\n"), 2);
  EXPECT_THAT(err_, AllOf(HasSubstr("nobody's"), HasSubstr("world, g1, instruction, raven")));
  EXPECT_EQ(Call({"chat", "--think=maybe"}, "Hi\n"), 2);
  EXPECT_EQ(Call({"chat", "--think=on"}, "Hi\n"), 1);
  EXPECT_THAT(err_, HasSubstr("\"world\" knows no thinking"));
  router_.logs["s"] = {'H', 'i'};
  EXPECT_EQ(Call({"chat", "--session=s", "--system=Be kind."}, "Hi\n"), 1);
  EXPECT_THAT(err_, HasSubstr("has begun without it"));
}

TEST_F(RwkvctlTest, ChatContinuesAnAnswerAndGivesItAnew) {
  router_.answer = " Hello there.";
  EXPECT_EQ(Call({"chat", "--max-tokens=6", "--seed=7"}, "Hi\n/continue\n/regenerate\n"), 0);
  EXPECT_EQ(out_, "Hello\nthere\nHello\n");
  ASSERT_THAT(router_.generate_requests, SizeIs(3));
  for (int i = 1; i < 3; ++i) {
    EXPECT_EQ(router_.generate_requests[i].input_case(), v1::GenerateRequest::INPUT_NOT_SET);
    EXPECT_THAT(router_.generate_requests[i].stop(), ElementsAre("\n\nUser:"));
  }
  EXPECT_EQ(router_.generate_requests[1].sampling().seed(), 7);
  EXPECT_EQ(router_.generate_requests[2].sampling().seed(), 8) << "the same seed would give the same answer";
  const std::vector<uint32_t>& log = router_.logs["session-1"];
  EXPECT_EQ(std::string(log.begin(), log.end()), Begun("User: Hi\n\nAssistant: Hello"));

  EXPECT_EQ(Call({"chat"}, "/regenerate\n"), 1);
  EXPECT_THAT(err_, HasSubstr("no whole answer"));
  EXPECT_EQ(Call({"chat"}, "/continue\n"), 1);
}

TEST_F(RwkvctlTest, ChatInterruptEndsTheAnswerNotTheSession) {
  terminal_ = true;
  router_.answer = "a long answer";
  int answers = 0;
  router_.on_token = [&](uint64_t index) {
    if (index == 3 && ++answers == 1) interrupts_.Interrupt();
  };
  EXPECT_EQ(Call({"chat"}, "one\ntwo\n"), 0);
  EXPECT_THAT(out_, StartsWith("Assistant: a l\n"));
  EXPECT_THAT(out_, HasSubstr("a long answer"));
  EXPECT_THAT(err_, HasSubstr("[stopped]"));
  ASSERT_THAT(router_.generate_requests, SizeIs(2));
  EXPECT_EQ(router_.generate_requests[1].text(), "\n\nUser: two\n\nAssistant:");
}

TEST_F(RwkvctlTest, ChatTriesAgainWhileTheLastTurnStillHoldsTheSession) {
  const absl::Status busy = common::WithRetryInfo(absl::AbortedError("a turn is running"), absl::ZeroDuration());
  router_.first_statuses = {busy, busy};
  EXPECT_EQ(Call({"chat"}, "Hi\n"), 0);
  ASSERT_THAT(router_.generate_requests, SizeIs(3));
  EXPECT_EQ(router_.generate_requests[0].request_id(), router_.generate_requests[2].request_id());
  EXPECT_EQ(out_, "Hello.\n");
}

TEST_F(RwkvctlTest, ChatErrorsEndAScriptButNotATerminal) {
  router_.first_statuses = {absl::UnavailableError("no pipeline")};
  EXPECT_EQ(Call({"chat"}, "one\ntwo\n"), 1);
  EXPECT_THAT(err_, HasSubstr("UNAVAILABLE: no pipeline (router 127.0.0.1:4711)"));
  terminal_ = true;
  router_.first_statuses = {absl::UnavailableError("no pipeline")};
  EXPECT_EQ(Call({"chat"}, "one\ntwo\n"), 0);
  EXPECT_THAT(err_, HasSubstr("UNAVAILABLE: no pipeline"));
  EXPECT_THAT(out_, HasSubstr("Hello."));
}

}  // namespace
}  // namespace rwkv::rwkvctl
