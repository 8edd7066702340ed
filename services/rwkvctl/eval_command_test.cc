// rwkvctl eval and embed, as command lines.
#include <cmath>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "services/rwkvctl/rwkvctl_fixture.h"

namespace rwkv::rwkvctl {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::SizeIs;

TEST_F(RwkvctlTest, EvalPerplexityFeedsOneDocumentAfterIdZero) {
  const std::string path = WriteFile("text", "abcd\xff");
  EXPECT_EQ(Call({"eval", "perplexity", path, "--json"}), 0);
  ASSERT_THAT(router_.documents, SizeIs(1));
  EXPECT_THAT(router_.documents[0].token_ids(), ElementsAre(0));
  EXPECT_EQ(router_.documents[0].text(), "abcd\xff");
  const nlohmann::json json = nlohmann::json::parse(out_);
  EXPECT_EQ(json.size(), 5);
  EXPECT_EQ(json["tokens"], 5);
  EXPECT_EQ(json["bytes"], 5);
  const double nats = ('a' + 'b' + 'c' + 'd' + 4 + 256) / 256.0;
  EXPECT_NEAR(json["nats_per_token"].get<double>(), nats / 5, 1e-9);
  EXPECT_NEAR(json["perplexity"].get<double>(), std::exp(nats / 5), 1e-9);
  EXPECT_NEAR(json["bits_per_byte"].get<double>(), nats / 5 / std::log(2.0), 1e-9);
  EXPECT_EQ(Call({"eval", "perplexity", "-", "--json"}, "abcd\xff"), 0);
  EXPECT_EQ(nlohmann::json::parse(out_), json);

  EXPECT_EQ(Call({"eval", "perplexity", path}), 0);
  EXPECT_THAT(out_, HasSubstr("BITS/BYTE"));
  EXPECT_THAT(out_, HasSubstr("0.5109"));
  terminal_ = true;
  EXPECT_EQ(Call({"eval", "perplexity", path}), 0);
  EXPECT_THAT(err_, AllOf(HasSubstr("60 %"), HasSubstr("100 %"), EndsWith("\r\x1b[K")));
}

TEST_F(RwkvctlTest, EvalSaysWhatIsWrongWithTheText) {
  EXPECT_EQ(Call({"eval", "perplexity", (folder_ / "none").string()}), 1);
  EXPECT_THAT(err_, AllOf(HasSubstr("NOT_FOUND"), HasSubstr("none")));
  EXPECT_EQ(Call({"eval", "perplexity", WriteFile("empty", "")}), 1);
  EXPECT_THAT(err_, AllOf(HasSubstr("INVALID_ARGUMENT"), HasSubstr("empty is empty")));
  EXPECT_EQ(Call({"eval", "perplexity", "-"}), 1);
  EXPECT_THAT(err_, HasSubstr("standard input is empty"));
  EXPECT_EQ(Call({"eval", "perplexity", folder_.string()}), 1);
  EXPECT_THAT(err_, HasSubstr(": Is a directory"));
  router_.has_tokenizer = false;
  EXPECT_EQ(Call({"eval", "perplexity", WriteFile("text", "a")}), 1);
  EXPECT_THAT(err_, AllOf(HasSubstr("FAILED_PRECONDITION"), HasSubstr("no tokenizer")));
}

TEST_F(RwkvctlTest, EvalPrintsATableOrOneObject) {
  struct Case {
    std::vector<std::string> arguments;
    const char* table;
    const char* key;
  };
  const std::string lambada = WriteFile("lambada.jsonl", "{\"text\": \"Say Hello.\"}\n");
  const std::string text = WriteFile("text", std::string(200, 'a'));
  const Case kCases[] = {
      {{"eval", "lambada", lambada, "--parallel", "1"}, "ACCURACY", "accuracy"},
      {{"eval", "context", text, "--window-tokens", "100"}, "POSITIONS", "rise_nats"},
      {{"eval", "needle", "--length", "400", "--depth", "50", "--parallel", "1"}, "DEPTH 50 %", "accuracy"},
      {{"eval", "needle", "--haystack", text, "--length", "400", "--trials", "1", "--parallel", "1"},
       "DEPTH 100 %",
       "cells"},
  };
  for (Case run : kCases) {
    EXPECT_EQ(Call(run.arguments), 0) << err_;
    EXPECT_THAT(out_, HasSubstr(run.table));
    run.arguments.push_back("--json");
    EXPECT_EQ(Call(run.arguments), 0) << err_;
    EXPECT_TRUE(nlohmann::json::parse(out_).contains(run.key)) << out_;
    EXPECT_EQ(std::count(out_.begin(), out_.end(), '\n'), 1);
  }
  EXPECT_EQ(Call({"eval", "lambada", text}), 1);
  EXPECT_THAT(err_, AllOf(HasSubstr("text: line 1"), HasSubstr("INVALID_ARGUMENT")));
}

TEST_F(RwkvctlTest, EvalBeginsEveryTextWithTheTunedStateItNames) {
  const std::string lambada = WriteFile("lambada.jsonl", "{\"text\": \"Say Hello.\"}\n");
  const std::string text = WriteFile("text", std::string(200, 'a'));
  EXPECT_EQ(Call({"eval", "lambada", lambada, "--parallel", "1", "--initial-state", "poet"}), 0) << err_;
  EXPECT_EQ(Call({"eval", "context", text, "--window-tokens", "100", "--initial-state", "poet"}), 0) << err_;
  EXPECT_EQ(Call({"eval", "perplexity", text, "--initial-state", "poet"}), 0) << err_;
  EXPECT_EQ(Call({"eval", "needle", "--length", "400", "--parallel", "1", "--initial-state", "poet"}), 0) << err_;
  EXPECT_THAT(router_.generate_requests, SizeIs(1 + 15));
  EXPECT_THAT(router_.score_requests, SizeIs(1));
  EXPECT_THAT(router_.documents, SizeIs(2 + 1));
  for (const auto& request : router_.generate_requests) EXPECT_EQ(request.initial_state(), "poet");
  for (const auto& request : router_.score_requests) EXPECT_EQ(request.initial_state(), "poet");
  for (const auto& document : router_.documents) EXPECT_EQ(document.initial_state(), "poet");
}

TEST_F(RwkvctlTest, EmbedPrintsOneVector) {
  EXPECT_EQ(Call({"embed", "abc"}), 0);
  EXPECT_EQ(out_, "97 99 0\n");
  EXPECT_EQ(Call({"embed", "--tokens", "5,6", "--source", "hidden-mean", "--normalize"}), 0);
  EXPECT_EQ(out_, "2.5 3 1\n");
  EXPECT_EQ(Call({"embed", "--prompt", "-", "--source=state", "--json"}, "xy"), 0);
  const nlohmann::json json = nlohmann::json::parse(out_);
  EXPECT_THAT(json["values"], ElementsAre(120, 121, 3));
  EXPECT_EQ(json["prompt_tokens"], 2);
}

}  // namespace
}  // namespace rwkv::rwkvctl
