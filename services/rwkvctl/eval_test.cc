// The measures of `eval` against a router in memory, whose tokens are bytes and whose logprobs are -(id + 1) / 256.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/grpc_status.h"
#include "services/router/client/fake_router_client.h"
#include "services/rwkvctl/eval_context.h"
#include "services/rwkvctl/eval_lambada.h"
#include "services/rwkvctl/eval_needle.h"
#include "services/rwkvctl/progress_bar.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::rwkvctl {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::SizeIs;

double Nats(const std::string& text) {
  double nats = 0;
  for (const char c : text) nats += (static_cast<unsigned char>(c) + 1) / 256.0;
  return nats;
}

class EvalTest : public ::testing::Test {
 protected:
  router::FakeRouterClient::State state_;
  router::FakeRouterClient client_{&state_};
  ProgressBar progress_{nullptr, ""};
};

TEST_F(EvalTest, LambadaSplitsBeforeTheLastWord) {
  const auto examples = ParseLambada("{\"text\": \"We go home\"}\n\n{\"text\": \"a \\u00e9t\\u00e9\", \"id\": 7}\r\n");
  ASSERT_THAT(examples, IsOk());
  ASSERT_THAT(*examples, SizeIs(2));
  EXPECT_EQ((*examples)[0].context, "We go");
  EXPECT_EQ((*examples)[0].target, " home");
  EXPECT_EQ((*examples)[1].context, "a");
  EXPECT_EQ((*examples)[1].target, " \xc3\xa9t\xc3\xa9");
}

TEST_F(EvalTest, LambadaNamesTheLineThatIsWrong) {
  struct Case {
    const char* jsonl;
    const char* message;
  };
  const Case kCases[] = {
      {"", "no example"},
      {"\n \n", "no example"},
      {"{\"text\": \"a b\"}\n{\"text\": 1}", "line 2 is not an object with a string \"text\""},
      {"{\"txt\": \"a b\"}", "line 1 is not an object"},
      {"[1]", "line 1 is not an object"},
      {"{\"text\": \"a b\"", "line 1 is not JSON"},
      {"{\"text\": \"a \xff\"}", "line 1 is not JSON"},
      {"{\"text\": \"a \\ud83d\"}", "line 1 is not JSON"},
      {"{\"text\": \"word\"}", "line 1: the text has no last word"},
      {"{\"text\": \" word\"}", "line 1: the text has no last word"},
      {"{\"text\": \"a word \"}", "line 1: the text has no last word"},
  };
  for (const Case& wrong : kCases) {
    EXPECT_THAT(ParseLambada(wrong.jsonl), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(wrong.message)))
        << wrong.jsonl;
  }
}

TEST_F(EvalTest, LambadaIsRightWhenEachTokenOfTheTargetIsTheLikeliest) {
  state_.answer_to = [](const std::string& input) -> std::string {
    return absl::EndsWith(input, "We go") ? " home" : " hose";
  };
  const std::vector<LambadaExample> examples = {{"We go", " home"}, {"They go", " home"}, {"We go", " to"}};
  const auto result = EvaluateLambada(client_, examples, 1, progress_);
  ASSERT_THAT(result, IsOk());
  EXPECT_EQ(result->examples, 3);
  EXPECT_EQ(result->correct, 1);
  EXPECT_NEAR(result->nats, 2 * Nats(" home") + Nats(" to"), 1e-9);
  EXPECT_NEAR(result->Perplexity(), std::exp(result->nats / 3), 1e-9);
  // Id 0 comes first, greedy, past the end of text, and no further than the target.
  ASSERT_THAT(state_.generate_requests, SizeIs(3));
  const v1::GenerateRequest& request = state_.generate_requests[0];
  EXPECT_THAT(request.tokens().ids(), ElementsAre(0, 'W', 'e', ' ', 'g', 'o'));
  EXPECT_EQ(request.max_tokens(), 5);
  EXPECT_EQ(request.sampling().temperature(), 0);
  EXPECT_TRUE(request.ignore_end_of_text());
  EXPECT_EQ(LambadaToJson(*result)["correct"], 1);
  EXPECT_THAT(LambadaToTable(*result), AllOf(HasSubstr("ACCURACY"), HasSubstr("33.33 %")));
}

TEST_F(EvalTest, ARefusedCallIsMadeAgainWhenTheRouterSaysSo) {
  state_.answer = " b";
  const absl::Status full = absl::ResourceExhaustedError("too many requests wait");
  state_.first_statuses = {common::WithRetryInfo(full, absl::Milliseconds(1)),
                           common::WithRetryInfo(absl::UnavailableError("no pipeline"), absl::Milliseconds(1))};
  const auto result = EvaluateLambada(client_, {{"a", " b"}}, 1, progress_);
  ASSERT_THAT(result, IsOk());
  EXPECT_EQ(result->correct, 1);
  EXPECT_THAT(state_.generate_requests, SizeIs(3));

  state_.first_statuses = {full};  // For good, as it seems.
  EXPECT_THAT(EvaluateLambada(client_, {{"a", " b"}}, 1, progress_),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("too many requests")));
}

TEST_F(EvalTest, ContextTakesMeansByPositionOverTheWindows) {
  // Two windows of 100 tokens; what is left over is not used.
  const std::string first = std::string(64, 'b') + std::string(36, 'a');
  const std::string second = std::string(64, 'd') + std::string(36, 'a');
  ContextOptions options;
  options.tokens = 100;
  const auto result = EvaluateContext(client_, first + second + "left over", options, progress_);
  ASSERT_THAT(result, IsOk());
  EXPECT_EQ(result->windows, 2);
  ASSERT_THAT(result->buckets, SizeIs(2));
  EXPECT_EQ(result->buckets[0].end, 64);
  EXPECT_EQ(result->buckets[1].begin, 64);
  EXPECT_EQ(result->buckets[1].end, 100);
  EXPECT_NEAR(result->buckets[0].nats_per_token, Nats("c"), 1e-6);
  EXPECT_NEAR(result->buckets[0].standard_error, 1 / 256.0, 1e-6);  // Half the distance of the two.
  EXPECT_NEAR(result->buckets[1].nats_per_token, Nats("a"), 1e-6);
  EXPECT_NEAR(result->buckets[1].standard_error, 0, 1e-6);
  EXPECT_EQ(result->rise_nats, 0);
  EXPECT_THAT(ContextToTable(*result), AllOf(HasSubstr("64..99"), HasSubstr("never rises")));
  ASSERT_THAT(state_.documents, SizeIs(2));
  EXPECT_THAT(state_.documents[1].token_ids(), SizeIs(101));
  EXPECT_EQ(state_.documents[1].token_ids(0), 0);

  options.windows = 1;
  const auto rising = EvaluateContext(client_, std::string(64, 'a') + std::string(136, 'b'), options, progress_);
  ASSERT_THAT(rising, IsOk());
  EXPECT_EQ(rising->windows, 1);
  EXPECT_NEAR(rising->rise_nats, 1 / 256.0, 1e-6);
  EXPECT_EQ(rising->rise_standard_error, 0);
  EXPECT_NEAR(ContextToJson(*rising)["rise_nats"].get<double>(), 1 / 256.0, 1e-6);
  EXPECT_THAT(ContextToTable(*rising), HasSubstr("rises by at most 0.0039 +- 0.0000"));

  // Rises of 1 and 3 between the same positions of two windows: 2 +- 1, however far apart the windows are.
  options.windows = 2;
  const auto paired = EvaluateContext(
      client_, std::string(64, 'a') + std::string(36, 'b') + std::string(64, 'A') + std::string(36, 'D'), options,
      progress_);
  ASSERT_THAT(paired, IsOk());
  EXPECT_NEAR(paired->rise_nats, 2 / 256.0, 1e-6);
  EXPECT_NEAR(paired->rise_standard_error, 1 / 256.0, 1e-6);

  EXPECT_THAT(EvaluateContext(client_, std::string(99, 'a'), options, progress_),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("99 tokens"), HasSubstr("100"))));
}

TEST_F(EvalTest, NeedlesStandAtTheirDepthInATextOfTheLength) {
  NeedleOptions options;
  options.lengths = {400, 600};
  options.depths = {0, 50, 100};
  options.trials = 2;
  options.haystack = "~";
  // Sees a key that stands in the last 300 tokens.
  state_.answer_to = [](const std::string& input) {
    const size_t key = input.find("The pass key is ");
    return input.size() - key < 300 ? absl::StrCat(" ", input.substr(key + 16, 5), ".") : " no idea";
  };
  const auto cells = EvaluateNeedle(client_, options, 1, progress_);
  ASSERT_THAT(cells, IsOk());
  std::vector<uint32_t> correct;
  for (const NeedleCell& cell : *cells) {
    EXPECT_EQ(cell.trials, 2);
    correct.push_back(cell.correct);
  }
  EXPECT_THAT(correct, ElementsAre(2, 2, 2, 0, 2, 2));
  ASSERT_THAT(state_.generate_requests, SizeIs(12));
  std::vector<size_t> before;  // Filler before the key.
  for (const v1::GenerateRequest& request : state_.generate_requests) {
    const std::string text(request.tokens().ids().begin(), request.tokens().ids().end());
    EXPECT_EQ(text[0], '\0');
    EXPECT_THAT(text, EndsWith("What is the pass key? The pass key is"));
    const std::string head = text.substr(0, text.find("The pass key is "));
    before.push_back(std::count(head.begin(), head.end(), '~'));
  }
  const std::string last(state_.generate_requests[11].tokens().ids().begin(),
                         state_.generate_requests[11].tokens().ids().end());
  EXPECT_EQ(last.size(), 600);
  const size_t filling = std::count(last.begin(), last.end(), '~');
  EXPECT_THAT(std::vector<size_t>(before.begin() + 6, before.end()),
              ElementsAre(0, 0, filling / 2, filling / 2, filling, filling));
  EXPECT_NEAR(NeedleToJson(*cells)["accuracy"].get<double>(), 10 / 12.0, 1e-9);
  EXPECT_THAT(NeedleToTable(*cells), AllOf(HasSubstr("DEPTH 50 %"), HasSubstr("400"), HasSubstr("2 trials")));

  options.lengths = {100};
  EXPECT_THAT(EvaluateNeedle(client_, options, 1, progress_),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("length 100")));
}

TEST_F(EvalTest, WithoutATokenizerNothingIsMeasured) {
  state_.has_tokenizer = false;
  EXPECT_THAT(EvaluateLambada(client_, {{"a", " b"}}, 1, progress_), StatusIs(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(EvaluateContext(client_, "text", {}, progress_), StatusIs(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(EvaluateNeedle(client_, {}, 1, progress_), StatusIs(absl::StatusCode::kFailedPrecondition));
}

}  // namespace
}  // namespace rwkv::rwkvctl
