// rwkvctl generate.
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "services/rwkvctl/rwkvctl_fixture.h"

namespace rwkv::rwkvctl {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

TEST_F(RwkvctlTest, GenerateStreamsTextAsItIs) {
  router_.answer = "Hello,\nworld";
  EXPECT_EQ(Call({"generate", "--prompt", "Hi", "--max-tokens", "12"}), 0);
  EXPECT_EQ(out_, "Hello,\nworld");
  EXPECT_EQ(request().text(), "Hi");
  EXPECT_FALSE(request().has_tokens());
  EXPECT_EQ(request().session_id(), "");
  EXPECT_EQ(request().request_id(), "");
  terminal_ = true;
  EXPECT_EQ(Call({"generate", "--prompt", "Hi"}), 0);
  EXPECT_EQ(out_, "Hello,\nworld\n");
}

TEST_F(RwkvctlTest, GenerateSendsEveryFlag) {
  router_.logs["s"] = {};
  router_.turns[{"s", "r"}] = {{1, 2}, "Hello.", {'H'}, false};  // Of which the first token was received.
  EXPECT_EQ(Call({"generate",
                  "--model",
                  "m",
                  "--session",
                  "s",
                  "--request-id",
                  "r",
                  "--tokens",
                  "1,2",
                  "--max-tokens",
                  "3",
                  "--temperature",
                  "0.5",
                  "--top-k",
                  "-7",
                  "--top-p",
                  "0.25",
                  "--min-p",
                  "0.125",
                  "--typical-p",
                  "0.75",
                  "--presence-penalty",
                  "-1",
                  "--frequency-penalty",
                  "2",
                  "--penalty-decay",
                  "0.5",
                  "--repetition-penalty",
                  "1.5",
                  "--penalize-prompt",
                  "--logit-bias",
                  "7=-inf",
                  "--logit-bias",
                  "5=-1.5",
                  "--logit-bias",
                  "6=2",
                  "--sampling-order",
                  "rwkv-pip",
                  "--seed",
                  "18446744073709551615",
                  "--stop",
                  "a",
                  "--stop",
                  "b",
                  "--stop-token",
                  "9",
                  "--stop-token",
                  "8",
                  "--ignore-eos",
                  "--logprobs",
                  "2",
                  "--resume-from",
                  "1",
                  "--json"}),
            0);
  EXPECT_EQ(request().model(), "m");
  EXPECT_EQ(request().session_id(), "s");
  EXPECT_EQ(request().request_id(), "r");
  EXPECT_THAT(request().tokens().ids(), ElementsAre(1, 2));
  EXPECT_EQ(request().max_tokens(), 3);
  const v1::Sampling& sampling = request().sampling();
  EXPECT_EQ(sampling.temperature(), 0.5f);
  EXPECT_EQ(sampling.top_k(), -7);  // The router says what is wrong with it.
  EXPECT_EQ(sampling.top_p(), 0.25f);
  EXPECT_EQ(sampling.min_p(), 0.125f);
  EXPECT_EQ(sampling.typical_p(), 0.75f);
  EXPECT_EQ(sampling.presence_penalty(), -1);
  EXPECT_EQ(sampling.frequency_penalty(), 2);
  EXPECT_EQ(sampling.penalty_decay(), 0.5f);
  EXPECT_EQ(sampling.repetition_penalty(), 1.5f);
  EXPECT_TRUE(sampling.penalize_prompt());
  EXPECT_EQ(sampling.logit_bias().at(7), -std::numeric_limits<float>::infinity());
  EXPECT_EQ(sampling.logit_bias().at(5), -1.5f);
  EXPECT_EQ(sampling.logit_bias().at(6), 2);
  EXPECT_EQ(sampling.order(), v1::SAMPLING_ORDER_RWKV_PIP);
  EXPECT_EQ(sampling.seed(), 18446744073709551615u);
  EXPECT_EQ(sampling.top_logprobs(), 2);
  EXPECT_THAT(request().stop(), ElementsAre("a", "b"));
  EXPECT_THAT(request().stop_token_ids(), ElementsAre(9, 8));
  EXPECT_TRUE(request().ignore_end_of_text());
  EXPECT_EQ(request().resume_from(), 1);
}

TEST_F(RwkvctlTest, GenerateLeavesUnsetWhatIsNotGiven) {
  EXPECT_EQ(Call({"generate", "--prompt", "Hi"}), 0);
  EXPECT_FALSE(request().has_max_tokens());
  const v1::Sampling& sampling = request().sampling();
  EXPECT_FALSE(sampling.has_temperature() || sampling.has_top_k() || sampling.has_top_p() || sampling.has_seed());
}

TEST_F(RwkvctlTest, GenerateJsonIsAnObjectATokenAndALastOne) {
  router_.answer = "ab";
  router_.logs["s"] = {};
  EXPECT_EQ(Call({"generate", "--json", "--prompt", "Hi", "--session", "s", "--max-tokens", "2", "--logprobs", "1",
                  "--seed", "5"}),
            0);
  std::vector<nlohmann::json> lines;
  for (absl::string_view line : absl::StrSplit(out_, '\n', absl::SkipEmpty())) {
    lines.push_back(nlohmann::json::parse(line.begin(), line.end()));
  }
  ASSERT_THAT(lines, SizeIs(3));
  EXPECT_EQ(lines[0],
            nlohmann::json::parse(
                R"({"index": 0, "id": 97, "text": "a", "logprob": -0.5, "top_logprobs": [{"id": 0, "logprob": 0}]})"));
  EXPECT_EQ(lines[1]["index"], 1);
  EXPECT_EQ(lines[2]["finish_reason"], "length");
  EXPECT_EQ(lines[2]["prompt_tokens"], 2);
  EXPECT_EQ(lines[2]["generated_tokens"], 2);
  EXPECT_EQ(lines[2]["session_tokens"], 4);
  EXPECT_EQ(lines[2]["session_id"], "s");
  EXPECT_EQ(lines[2]["seed"], 5);
  EXPECT_EQ(lines[2]["queue_seconds"], 0.001);
  EXPECT_EQ(lines[2]["prefill_seconds"], 0.25);
  EXPECT_EQ(lines[2]["decode_seconds"], 1);
}

TEST_F(RwkvctlTest, GenerateNamesTheTurnsOfASessionSoThatTheyCanBeResumed) {
  router_.logs["s"] = {};
  EXPECT_EQ(Call({"generate", "--prompt", "Hi", "--session", "s"}), 0);
  const std::string first = request().request_id();
  EXPECT_THAT(first, SizeIs(32));
  EXPECT_EQ(Call({"generate", "--prompt", "Hi", "--session", "s"}), 0);
  EXPECT_NE(request().request_id(), first);
}

TEST_F(RwkvctlTest, GenerateWithoutAPromptGoesOnWithTheSession) {
  router_.answer = "Hello there.";
  router_.logs["s"] = {};
  EXPECT_EQ(Call({"generate", "--prompt", "Hi", "--session", "s", "--max-tokens", "5"}), 0);
  EXPECT_EQ(out_, "Hello");
  EXPECT_EQ(Call({"generate", "--session", "s", "--max-tokens", "3"}), 0);
  EXPECT_EQ(out_, " th");
  EXPECT_EQ(request().input_case(), v1::GenerateRequest::INPUT_NOT_SET);
  EXPECT_EQ(Call({"generate", "--session", "s", "--prompt", ""}), 0);
  EXPECT_EQ(out_, "ere.");
  const std::vector<uint32_t>& log = router_.logs["s"];
  EXPECT_EQ(std::string(log.begin(), log.end()), "HiHello there.");
  EXPECT_EQ(Call({"generate"}), 2);
  EXPECT_EQ(Call({"generate", "--session", "s", "--template=world"}), 1);
}

TEST_F(RwkvctlTest, GeneratePrintsIdsWhereThereIsNoText) {
  router_.answer = "ab";
  router_.has_tokenizer = false;
  EXPECT_EQ(Call({"generate", "--tokens", "1,2"}), 0);
  EXPECT_EQ(out_, "97 98\n");
  router_.has_tokenizer = true;
  EXPECT_EQ(Call({"generate", "--tokens", "1,2"}), 0);
  EXPECT_EQ(out_, "ab");
}

TEST_F(RwkvctlTest, GenerateReadsAPromptFromStandardInput) {
  EXPECT_EQ(Call({"generate", "--prompt", "-"}, "two\nlines\n"), 0);
  EXPECT_EQ(request().text(), "two\nlines\n");
  EXPECT_EQ(Call({"generate", "--prompt", "-"}, "bad \xFF"), 1);
  EXPECT_THAT(err_, HasSubstr("UTF-8"));
}

TEST_F(RwkvctlTest, GenerateWithATemplateIsOneTurnOfAChat) {
  router_.answer = " Hello.";
  EXPECT_EQ(Call({"generate", "--template", "world", "--prompt", "Hi\n\nthere "}), 0);
  EXPECT_EQ(out_, "Hello.");
  EXPECT_EQ(Fed(request()), Begun("User: Hi\nthere\n\nAssistant:"));
  EXPECT_THAT(request().stop(), ElementsAre("\n\nUser:"));
  router_.logs["s"] = {'x'};
  EXPECT_EQ(Call({"generate", "--template=world", "--session=s", "--prompt=Hi"}), 0);
  EXPECT_EQ(request().text(), "\n\nUser: Hi\n\nAssistant:");
  EXPECT_EQ(Call({"generate", "--template=world", "--tokens=1"}), 1);
  EXPECT_THAT(err_, HasSubstr("--template needs --prompt"));
  EXPECT_EQ(Call({"generate", "--template=world", "--prompt=Hi", "--session=s", "--resume-from=1"}), 2);
  EXPECT_EQ(Call({"generate", "--think=on", "--prompt=Hi"}), 2);
  EXPECT_THAT(err_, HasSubstr("need --template"));
}

}  // namespace
}  // namespace rwkv::rwkvctl
