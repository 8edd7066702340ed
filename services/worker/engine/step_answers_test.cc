// What the last stage draws and scores.
#include "services/worker/engine/step_answers.h"

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/engine/stage_engine.h"
#include "services/worker/sampler/sampler.h"
#include "services/worker/testing/small_model.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

class StepAnswersTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { path_ = WriteSmallModel(); }

  StepAnswersTest() : pipeline_(path_, 2, Options()) {}

  static TestEngineOptions Options() {
    TestEngineOptions options;
    options.slots = 4;
    options.max_batch_tokens = 10;
    return options;
  }

  static std::string path_;
  EnginePipeline pipeline_;
};

std::string StepAnswersTest::path_;

TEST_F(StepAnswersTest, ScoresAreTheLogprobsOfDrawnTokens) {
  // Greedy: the scored token is the one that was drawn.
  v1::Sampling sampling;
  sampling.set_top_logprobs(3);
  ASSERT_THAT(pipeline_.AttachFresh(0, 1, sampling), IsOk());
  const absl::StatusOr<StepOutput> drawn = pipeline_.Feed(0, 1, 0, {1, 2, 3}, false, true);
  ASSERT_THAT(drawn, IsOk());
  const v1::EntryResult& entry = drawn->result.entries(0);
  ASSERT_EQ(entry.top_logprobs_size(), 3);
  EXPECT_EQ(entry.top_logprobs(0).token_id(), entry.token_id());
  EXPECT_EQ(entry.top_logprobs(0).logprob(), entry.logprob());
  EXPECT_TRUE(drawn->logits.empty());

  ASSERT_THAT(pipeline_.AttachFresh(1, 2), IsOk());
  v1::Step step;
  *step.add_entries() = Entry(1, 2, 0, {1, 2, 3}, false);
  for (uint32_t id : {2u, 3u, entry.token_id()}) step.mutable_entries(0)->add_score_token_ids(id);
  const absl::StatusOr<StepOutput> scored = pipeline_.Step(step);
  ASSERT_THAT(scored, IsOk());
  ASSERT_EQ(scored->result.entries(0).scores_size(), 3);
  EXPECT_EQ(scored->result.entries(0).scores(2), entry.logprob());
  EXPECT_LT(scored->result.entries(0).scores(0), 0);
  EXPECT_FALSE(scored->result.entries(0).has_token_id());

  // One fewer than tokens, and a draw beside it.
  ASSERT_THAT(pipeline_.AttachFresh(2, 3), IsOk());
  v1::Step both;
  *both.add_entries() = Entry(2, 3, 0, {1, 2, 3}, false, true);
  both.mutable_entries(0)->add_score_token_ids(2);
  both.mutable_entries(0)->add_score_token_ids(3);
  const absl::StatusOr<StepOutput> mixed = pipeline_.Step(both);
  ASSERT_THAT(mixed, IsOk());
  EXPECT_EQ(mixed->result.entries(0).token_id(), entry.token_id());
  EXPECT_EQ(mixed->result.entries(0).logprob(), entry.logprob());
  ASSERT_EQ(mixed->result.entries(0).scores_size(), 2);
  EXPECT_EQ(mixed->result.entries(0).scores(1), scored->result.entries(0).scores(1));
}

TEST_F(StepAnswersTest, ATurnAttachedAgainDrawsTheSameTokens) {
  v1::Sampling sampling;
  sampling.set_temperature(1.3f);
  sampling.set_seed(99);
  sampling.set_presence_penalty(0.8f);
  sampling.set_frequency_penalty(0.4f);
  const std::vector<uint32_t> prompt = {8, 9, 10};
  const auto generate = [&](int slot, uint64_t sequence, uint64_t position, uint32_t next, int count) {
    std::vector<uint32_t> tokens;
    for (int i = 0; i < count; ++i) {
      const absl::StatusOr<StepOutput> output = pipeline_.Feed(slot, sequence, position + i, {next}, false, true);
      EXPECT_THAT(output, IsOk());
      next = output->result.entries(0).token_id();
      tokens.push_back(next);
    }
    return tokens;
  };
  ASSERT_THAT(pipeline_.AttachFresh(0, 1, sampling), IsOk());
  ASSERT_THAT(pipeline_.Feed(0, 1, 0, {8, 9}, false), IsOk());
  const std::vector<uint32_t> whole = generate(0, 1, 2, 10, 24);

  v1::AttachSequence attach;
  attach.set_slot(1);
  attach.set_sequence(2);
  attach.set_fresh(true);
  *attach.mutable_sampling() = sampling;
  for (int i = 0; i < 11; ++i) attach.add_turn_token_ids(whole[i]);
  ASSERT_THAT(pipeline_.Attach(attach), IsOk());
  uint64_t position = 0;
  for (uint32_t token : {8u, 9u, 10u}) ASSERT_THAT(pipeline_.Feed(1, 2, position++, {token}, false), IsOk());
  for (int i = 0; i < 10; ++i) ASSERT_THAT(pipeline_.Feed(1, 2, position++, {whole[i]}, false), IsOk());
  EXPECT_EQ(generate(1, 2, position, whole[10], 13), std::vector<uint32_t>(whole.begin() + 11, whole.end()));
}

// Entries of a step are answered by the device's threads, and tell of themselves in the step's order.
TEST_F(StepAnswersTest, AnyNumberOfThreadsGivesTheSameAnswers) {
  std::vector<std::vector<std::string>> answers;
  for (const int threads : {1, 2, 3, 7}) {
    TestEngineOptions options = Options();
    options.slots = 8;
    options.max_batch_tokens = 24;
    options.threads = threads;
    EnginePipeline pipeline(path_, 1, options);
    for (int slot = 0; slot < 8; ++slot) {
      v1::Sampling sampling;
      sampling.set_seed(static_cast<uint64_t>(slot));
      sampling.set_temperature(slot % 3 == 0 ? 0 : 2);
      sampling.set_presence_penalty(slot % 2 == 0 ? 0 : 0.5f);
      ASSERT_THAT(pipeline.AttachFresh(slot, static_cast<uint64_t>(slot) + 1, sampling), IsOk());
    }
    std::vector<std::string>& mine = answers.emplace_back();
    for (uint64_t position = 0; position < 9; position += 3) {
      v1::Step step;
      for (int slot = 0; slot < 8; ++slot) {
        *step.add_entries() = Entry(slot, static_cast<uint64_t>(slot) + 1, position, {1, 2, 3}, slot == 5, true);
      }
      const absl::StatusOr<StepOutput> output = pipeline.Step(step);
      ASSERT_THAT(output, IsOk());
      for (const v1::EntryResult& entry : output->result.entries()) mine.push_back(entry.SerializeAsString());
      mine.push_back(LogitsOf(*output, 6));
      ASSERT_FALSE(mine.back().empty());
    }
    EXPECT_EQ(mine, answers.front()) << threads << " threads";
  }
}

// A draw is keyed by the place of its token in the log, however the prompt came there.
TEST_F(StepAnswersTest, ADrawDoesNotDependOnThePromptsChunks) {
  const std::vector<uint32_t> prompt = {8, 9, 10, 11};
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    v1::Sampling sampling;
    sampling.set_temperature(5);
    sampling.set_seed(seed);
    ASSERT_THAT(pipeline_.AttachFresh(0, 2 * seed, sampling), IsOk());
    const absl::StatusOr<StepOutput> whole = pipeline_.Feed(0, 2 * seed, 0, prompt, false, true);
    ASSERT_THAT(whole, IsOk());
    ASSERT_THAT(pipeline_.AttachFresh(1, 2 * seed + 1, sampling), IsOk());
    ASSERT_THAT(pipeline_.Feed(1, 2 * seed + 1, 0, {8, 9, 10}, false), IsOk());
    const absl::StatusOr<StepOutput> last = pipeline_.Feed(1, 2 * seed + 1, 3, {11}, false, true);
    ASSERT_THAT(last, IsOk());
    EXPECT_EQ(last->result.entries(0).token_id(), whole->result.entries(0).token_id()) << "seed " << seed;
  }
}

// The sampler's own draw, from the same logits, for the place behind the last token that was fed.
TEST_F(StepAnswersTest, ADrawIsKeyedByThePlaceOfItsToken) {
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    v1::Sampling sampling;
    sampling.set_temperature(5);
    sampling.set_seed(seed);
    ASSERT_THAT(pipeline_.AttachFresh(0, seed, sampling), IsOk());
    ASSERT_THAT(pipeline_.Feed(0, seed, 0, {4, 5}, false), IsOk());
    const absl::StatusOr<StepOutput> output = pipeline_.Feed(0, seed, 2, {8, 9, 10}, true, true);
    ASSERT_THAT(output, IsOk());
    const std::string bytes = LogitsOf(*output, seed);
    std::vector<float> logits(kSmallVocabulary);
    ASSERT_EQ(bytes.size(), 3 * kSmallVocabulary * sizeof(float));
    std::memcpy(logits.data(), &bytes[2 * kSmallVocabulary * sizeof(float)], kSmallVocabulary * sizeof(float));
    PenaltyState penalties;
    ASSERT_OK_AND_ASSIGN(const SamplingParams params, SamplingParams::Create(sampling, kSmallVocabulary, {}));
    ASSERT_OK_AND_ASSIGN(const SampledToken sampled, Sampler().Sample(logits, params, /*position=*/5, penalties));
    EXPECT_EQ(output->result.entries(0).token_id(), sampled.token) << "seed " << seed;
  }
}

TEST_F(StepAnswersTest, LogitsSayWhichRowsTheyAre) {
  ASSERT_THAT(pipeline_.AttachFresh(0, 1), IsOk());
  ASSERT_THAT(pipeline_.Feed(0, 1, 0, {4, 5}, false), IsOk());
  const absl::StatusOr<StepOutput> output = pipeline_.Feed(0, 1, 2, {8, 9, 10}, true);
  ASSERT_THAT(output, IsOk());
  ASSERT_EQ(output->logits.size(), 1u);
  EXPECT_EQ(output->logits[0].first_position(), 2u);
  EXPECT_EQ(output->logits[0].rows(), 3u);
  EXPECT_EQ(output->logits[0].sequence(), 1u);
  EXPECT_EQ(output->logits[0].logits().size(), 3 * kSmallVocabulary * sizeof(float));
}

TEST_F(StepAnswersTest, AnEntryThatFailsAnswersNothingElse) {
  v1::AttachSequence attach;
  attach.set_fresh(true);
  attach.set_sequence(1);
  attach.add_banned_token_ids(0);
  attach.add_banned_token_ids(kSmallVocabulary);
  ASSERT_THAT(pipeline_.Attach(attach), IsOk());
  v1::Step step;
  *step.add_entries() = Entry(0, 1, 0, {1, 2}, false, true);
  step.mutable_entries(0)->add_score_token_ids(2);
  const absl::StatusOr<StepOutput> output = pipeline_.Step(step);
  ASSERT_THAT(output, IsOk());
  const v1::EntryResult& result = output->result.entries(0);
  EXPECT_THAT(StatusOf(result), StatusIs(absl::StatusCode::kInternal, HasSubstr("banned")));
  EXPECT_EQ(result.scores_size(), 0) << "they were computed before the draw";
  EXPECT_FALSE(result.has_token_id());
}

TEST_F(StepAnswersTest, BannedTokensAreNeverDrawn) {
  v1::AttachSequence attach;
  attach.set_fresh(true);
  attach.set_sequence(1);
  attach.add_banned_token_ids(0);
  attach.add_banned_token_ids(60);
  ASSERT_THAT(pipeline_.Attach(attach), IsOk());
  const absl::StatusOr<StepOutput> output = pipeline_.Feed(0, 1, 0, {1, 2}, false, true);
  ASSERT_THAT(output, IsOk());
  EXPECT_EQ(output->result.entries(0).token_id(), 60u);
}

}  // namespace
}  // namespace rwkv::worker
