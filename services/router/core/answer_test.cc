#include "services/router/core/answer.h"

#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/common.pb.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/turn_spec.pb.h"
#include "services/tokenizer/tokenizer.h"

namespace rwkv::router {
namespace {

using ::testing::ElementsAre;

// Id b + 1 is byte b; id 0 ends the text.
class ByteTokenizer final : public tokenizer::Tokenizer {
 public:
  ByteTokenizer() {
    for (int byte = 0; byte < 256; ++byte) bytes_.push_back(static_cast<char>(byte));
  }
  absl::string_view name() const override { return "bytes"; }
  std::vector<uint32_t> Encode(absl::string_view bytes) const override {
    std::vector<uint32_t> ids;
    for (const char byte : bytes) ids.push_back(static_cast<unsigned char>(byte) + 1u);
    return ids;
  }
  absl::string_view TokenBytes(uint32_t id) const override {
    return id == 0 || id > 256 ? absl::string_view() : absl::string_view(bytes_).substr(id - 1, 1);
  }
  uint32_t vocab_size() const override { return 257; }
  uint32_t end_of_text() const override { return 0; }

 private:
  std::string bytes_;
};

v1::TurnSpec Spec(uint32_t max_tokens, std::vector<std::string> stops = {}) {
  v1::TurnSpec spec;
  spec.set_max_tokens(max_tokens);
  for (const std::string& stop : stops) spec.add_stop(stop);
  return spec;
}

std::vector<std::string> Pieces(const Answer& answer) {
  std::vector<std::string> pieces;
  for (size_t i = 0; i < answer.size(); ++i) pieces.push_back(answer.Message(i).text());
  pieces.push_back(answer.last_text());
  return pieces;
}

class AnswerTest : public ::testing::Test {
 protected:
  void Push(Answer& answer, absl::string_view bytes) {
    for (uint32_t id : tokenizer_.Encode(bytes)) answer.Push(id, -0.5f, {});
  }
  ByteTokenizer tokenizer_;
};

TEST_F(AnswerTest, ACharacterComesWithTheTokenThatCompletesIt) {
  Answer answer(&tokenizer_, Spec(10));
  Push(answer, "a\xc3\xbc!");
  EXPECT_THAT(Pieces(answer), ElementsAre("a", "", "\xc3\xbc", "!", ""));
  EXPECT_FALSE(answer.finished());
}

TEST_F(AnswerTest, TheLastTokenBringsWhatWasHeldBack) {
  Answer answer(&tokenizer_, Spec(3, {"xyz"}));
  Push(answer, "axyz");
  EXPECT_EQ(answer.reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_THAT(Pieces(answer), ElementsAre("a", "", "xy", ""));
}

TEST_F(AnswerTest, AStopTokenIsNotKeptAndTheLastMessageBringsWhatWasHeldBack) {
  Answer answer(&tokenizer_, Spec(10, {"xyz"}));
  Push(answer, "ax");
  answer.Push(0, 0, {});
  EXPECT_EQ(answer.reason(), v1::FINISH_REASON_STOP_TOKEN);
  EXPECT_EQ(answer.stop_token_id(), 0u);
  EXPECT_THAT(Pieces(answer), ElementsAre("a", "", "x"));
  Push(answer, "more");
  EXPECT_EQ(answer.size(), 2);
}

TEST_F(AnswerTest, EndOfTextStopsBesideAnyStopTokens) {
  for (const uint32_t stop : {0u, 5u, 7u}) {
    v1::TurnSpec spec = Spec(10);
    spec.add_stop_token_ids(5);
    spec.add_stop_token_ids(7);
    Answer answer(&tokenizer_, spec);
    answer.Push(6, -0.5f, {});
    EXPECT_FALSE(answer.finished());
    answer.Push(stop, -0.5f, {});
    EXPECT_EQ(answer.reason(), v1::FINISH_REASON_STOP_TOKEN) << stop;
    EXPECT_EQ(answer.stop_token_id(), stop);
    EXPECT_EQ(answer.size(), 1u);
  }
}

TEST_F(AnswerTest, EndOfTextCanBeIgnored) {
  v1::TurnSpec spec = Spec(10);
  spec.set_ignore_end_of_text(true);
  Answer answer(&tokenizer_, spec);
  answer.Push(0, 0, {});
  EXPECT_FALSE(answer.finished());
  EXPECT_EQ(answer.size(), 1);
}

TEST_F(AnswerTest, TheTextEndsBeforeAStopString) {
  Answer answer(&tokenizer_, Spec(10, {"nd", "zzz"}));
  Push(answer, "end");
  EXPECT_EQ(answer.reason(), v1::FINISH_REASON_STOP_STRING);
  EXPECT_EQ(answer.stop_string(), "nd");
  EXPECT_EQ(answer.size(), 3);  // The tokens stay.
  EXPECT_THAT(Pieces(answer), ElementsAre("e", "", "", ""));
}

TEST_F(AnswerTest, OutOfTheLogTheMessagesAreTheSame) {
  for (const std::string text : {"a\xc3\xbcxy", "endless", "\xff\xfe x", "xyz"}) {
    Answer drawn(&tokenizer_, Spec(5, {"nd", "xyz"}));
    Push(drawn, text);
    if (!drawn.finished()) drawn.Push(0, 0, {});
    Answer logged(&tokenizer_, Spec(5, {"nd", "xyz"}));
    for (size_t i = 0; i < drawn.size(); ++i) logged.PushLogged(drawn.ids()[i], drawn.logprobs()[i]);
    logged.Finish(drawn.reason(), drawn.stop_token_id(), drawn.stop_string());
    EXPECT_EQ(logged.reason(), drawn.reason()) << text;
    EXPECT_EQ(Pieces(logged), Pieces(drawn)) << text;
    EXPECT_EQ(logged.ids(), drawn.ids()) << text;
  }
}

TEST_F(AnswerTest, WithoutATokenizerThereIsNoText) {
  v1::TurnSpec spec = Spec(3);
  spec.add_stop_token_ids(7);
  Answer answer(nullptr, spec);
  answer.Push(0, -1, {});  // Not an end of text: nobody says so.
  answer.Push(5, -2, {});
  EXPECT_EQ(answer.Message(1).token_id(), 5);
  EXPECT_EQ(answer.Message(1).index(), 1);
  EXPECT_EQ(answer.Message(1).logprob(), -2);
  answer.Push(7, -3, {});
  EXPECT_EQ(answer.reason(), v1::FINISH_REASON_STOP_TOKEN);
  EXPECT_THAT(Pieces(answer), ElementsAre("", "", ""));
}

TEST_F(AnswerTest, TopLogprobsAreKeptUntilTheyAreSent) {
  Answer answer(nullptr, Spec(10));
  v1::TokenLogprob top;
  top.set_token_id(4);
  answer.PushLogged(1, 0);
  for (uint32_t id = 2; id < 5; ++id) answer.Push(id, 0, {top, top});
  EXPECT_EQ(answer.Message(0).top_logprobs_size(), 0);
  EXPECT_EQ(answer.Message(1).top_logprobs_size(), 2);
  answer.Sent(2);
  EXPECT_EQ(answer.Message(1).top_logprobs_size(), 0);
  EXPECT_EQ(answer.Message(2).top_logprobs_size(), 2);
  answer.Sent(4);
  answer.Push(9, 0, {top});
  EXPECT_EQ(answer.Message(4).top_logprobs_size(), 1);
}

TEST_F(AnswerTest, ATurnWithoutTokensEndsAsItIsTold) {
  Answer answer(&tokenizer_, Spec(0));
  EXPECT_FALSE(answer.finished());
  answer.Finish(v1::FINISH_REASON_LENGTH, absl::nullopt, "");
  EXPECT_EQ(answer.reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(answer.size(), 0);
}

}  // namespace
}  // namespace rwkv::router
