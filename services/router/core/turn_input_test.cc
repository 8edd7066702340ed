#include "services/router/core/turn_input.h"

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/turn_spec.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/core/serving_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

ServingModel Model(int vocab_size = 1000) {
  v1::ModelInfo info;
  info.set_name("tiny");
  info.set_fingerprint("abcd");
  info.set_vocab_size(vocab_size);
  info.set_tokenizer("what a worker says does not count");
  return MakeServingModel(info, {});
}

v1::GenerateRequest Base() {
  v1::GenerateRequest request;
  request.mutable_tokens()->add_ids(1);
  request.mutable_tokens()->add_ids(2);
  return request;
}

TEST(TurnInputTest, DefaultsAreFilledIn) {
  const absl::StatusOr<TurnInput> input = MakeTurnInput(Base(), Model(), InputLimits(), 77);
  ASSERT_THAT(input, IsOk());
  EXPECT_THAT(input->tokens, ElementsAre(1, 2));
  EXPECT_EQ(input->spec.max_tokens(), 256);
  EXPECT_TRUE(input->spec.seed_drawn());
  const v1::Sampling& sampling = input->spec.sampling();
  EXPECT_EQ(sampling.seed(), 77);
  EXPECT_TRUE(sampling.has_temperature() && sampling.has_top_k() && sampling.has_top_p() && sampling.has_typical_p() &&
              sampling.has_min_p() && sampling.has_presence_penalty() && sampling.has_frequency_penalty() &&
              sampling.has_penalty_decay() && sampling.has_repetition_penalty());
}

TEST(TurnInputTest, PrefixEndsLieInTheInputAndAscend) {
  const std::vector<std::vector<uint32_t>> wrong = {{0}, {3}, {1, 1}, {2, 1}, std::vector<uint32_t>(17, 1)};
  for (const std::vector<uint32_t>& ends : wrong) {
    v1::GenerateRequest request = Base();
    request.mutable_prefix_ends()->Add(ends.begin(), ends.end());
    EXPECT_THAT(MakeTurnInput(request, Model(), InputLimits(), 77).status(),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("prefix_ends")));
  }
  v1::GenerateRequest request = Base();
  for (const uint32_t end : {1, 2}) request.add_prefix_ends(end);
  const absl::StatusOr<TurnInput> input = MakeTurnInput(request, Model(), InputLimits(), 77);
  ASSERT_THAT(input, IsOk());
  EXPECT_THAT(input->prefix_ends, ElementsAre(1, 2));
}

TEST(TurnInputTest, StopTokensAreSortedAndEachOnce) {
  v1::GenerateRequest request = Base();
  for (uint32_t id : {9, 3, 9, 5}) request.add_stop_token_ids(id);
  const absl::StatusOr<TurnInput> input = MakeTurnInput(request, Model(), InputLimits(), 77);
  ASSERT_THAT(input, IsOk());
  EXPECT_THAT(input->spec.stop_token_ids(), ElementsAre(3, 5, 9));
}

TEST(TurnInputTest, ARepetitionIsTheSameAlsoWithAnotherDrawnSeed) {
  v1::GenerateRequest request = Base();
  request.mutable_sampling()->set_temperature(1);
  (*request.mutable_sampling()->mutable_logit_bias())[3] = 1;
  (*request.mutable_sampling()->mutable_logit_bias())[4] = 2;
  const v1::TurnSpec first = MakeTurnInput(request, Model(), InputLimits(), 1)->spec;
  v1::TurnSpec stored;
  ASSERT_TRUE(stored.ParseFromString(first.SerializeAsString()));
  EXPECT_THAT(CheckSameSpec(stored, MakeTurnInput(request, Model(), InputLimits(), 2)->spec), IsOk());

  const auto differs = [&](const v1::GenerateRequest& other) {
    const absl::Status status = CheckSameSpec(stored, MakeTurnInput(other, Model(), InputLimits(), 1)->spec);
    EXPECT_EQ(common::GetInvalidField(status), "request_id");
    return absl::IsInvalidArgument(status);
  };
  v1::GenerateRequest other = request;
  other.mutable_sampling()->set_seed(1);  // Said, not drawn.
  EXPECT_TRUE(differs(other));
  other = request;
  (*other.mutable_sampling()->mutable_logit_bias())[4] = 3;
  EXPECT_TRUE(differs(other));
  other = request;
  other.set_ignore_end_of_text(true);
  EXPECT_TRUE(differs(other));
}

TEST(TurnInputTest, FindsTheFirstByteThatIsNotUtf8) {
  const struct {
    std::string text;
    size_t offset;
  } cases[] = {
      {"", absl::string_view::npos},
      {"plain", absl::string_view::npos},
      {"\xc3\xbc\xe2\x82\xac\xf0\x9f\x98\x80", absl::string_view::npos},
      {"\x80", 0},
      {"a\xc0\x80", 1},            // Overlong.
      {"ab\xed\xa0\x80", 2},       // A surrogate.
      {"abc\xf4\x90\x80\x80", 3},  // Beyond U+10FFFF.
      {"\xc3\xbc\xe2\x82", 2},     // Cut.
      {"\xc3\xbc\xe2\x82\xac\xff", 5},
      {std::string("\0\xff", 2), 1},
  };
  for (const auto& one : cases) EXPECT_EQ(FindInvalidUtf8(one.text), one.offset) << ::testing::PrintToString(one.text);
}

TEST(TurnInputTest, OnlyModelsOfTheWorldsSizeGetItsTokenizer) {
  EXPECT_EQ(Model().tokenizer, nullptr);
  EXPECT_EQ(Model().info.tokenizer(), "");
}

TEST(TurnInputTest, AnotherModelIsNotFound) {
  EXPECT_THAT(CheckModel("", Model()), IsOk());
  EXPECT_THAT(CheckModel("tiny", Model()), IsOk());
  EXPECT_THAT(CheckModel("abcd", Model()), IsOk());
  EXPECT_THAT(CheckModel("large", Model()),
              StatusIs(absl::StatusCode::kNotFound, ::testing::AllOf(HasSubstr("large"), HasSubstr("tiny"))));
}

TEST(TurnInputTest, SessionIdsAreShortAndPlain) {
  EXPECT_THAT(CheckSessionId("session_id", "AZaz09._-:"), IsOk());
  for (const std::string& id : {std::string(), std::string(129, 'a'), std::string("a/b"), std::string("\xc3\xbc")}) {
    EXPECT_EQ(common::GetInvalidField(CheckSessionId("session_id", id)), "session_id") << id;
  }
}

}  // namespace
}  // namespace rwkv::router
