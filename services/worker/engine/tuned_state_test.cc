// Sequences that begin with a tuned state, the model's own or one of a file.
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/engine/stage_engine.h"
#include "services/worker/testing/small_model.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;

class OwnStateTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { path_ = WriteSmallModel(); }

  OwnStateTest() : pipeline_(path_, 2, Options()) {}

  static TestEngineOptions Options() {
    TestEngineOptions options;
    options.slots = 4;
    options.max_batch_tokens = 10;
    return options;
  }

  static std::string path_;
  EnginePipeline pipeline_;
};

std::string OwnStateTest::path_;

TEST_F(OwnStateTest, ATunedInitialStateIsWhatAFreshSlotHolds) {
  rwkv::testing::RandomModelOptions options = SmallModel();
  options.time_state = true;
  const std::string path = TempPath("time-state.safetensors");
  ASSERT_THAT(rwkv::testing::WriteRandomModel(options, path), IsOk());
  EnginePipeline tuned(path, 2, Options());
  ASSERT_THAT(tuned.AttachFresh(0, 1), IsOk());
  const auto fresh = tuned.CopyState(0, 1, 0);
  ASSERT_THAT(fresh, IsOk());
  const std::string zeros((*fresh)[0].size(), '\0');
  for (const std::string& record : *fresh) EXPECT_NE(record, zeros);
  ASSERT_THAT(tuned.Feed(0, 1, 0, {1, 2, 3}), IsOk());
  ASSERT_THAT(tuned.AttachFresh(0, 2), IsOk());
  EXPECT_EQ(*tuned.CopyState(0, 2, 0), *fresh);
  ASSERT_THAT(pipeline_.AttachFresh(0, 1), IsOk());
  const auto plain = pipeline_.CopyState(0, 1, 0);
  ASSERT_THAT(plain, IsOk());
  for (const std::string& record : *plain) EXPECT_EQ(record, zeros);
}

class TunedStateTest : public OwnStateTest {
 protected:
  TunedStateTest() {
    rwkv::testing::RandomModelOptions model = SmallModel();
    model.time_state = true;  // Of its own: replaced by the tuned one.
    model_path_ = TempPath("own-state.safetensors");
    EXPECT_THAT(rwkv::testing::WriteRandomModel(model, model_path_), IsOk());
    model.seed = 2;
    const auto other = rwkv::testing::MakeRandomModel(model);
    EXPECT_THAT(other, IsOk());
    std::vector<rwkv::testing::RawTensor> states;
    for (const rwkv::testing::RawTensor& tensor : *other) {
      if (absl::EndsWith(tensor.spec.name, "time_state")) states.push_back(tensor);
    }
    const std::string file = TempPath("tuned.safetensors");
    EXPECT_THAT(rwkv::testing::WriteFileAtomically(file, rwkv::testing::SafetensorsBytes(states)), IsOk());
    options_ = Options();
    options_.max_batch_tokens = 32;
    options_.initial_states = {absl::StrCat("poet=", file)};
    tuned_ = std::make_unique<EnginePipeline>(model_path_, 1, options_);
    id_ = tuned_->stage(0).tuned_state_ids().front();
  }

  std::string model_path_;
  TestEngineOptions options_;
  std::string id_;
  std::unique_ptr<EnginePipeline> tuned_;  // One stage.
};

TEST_F(TunedStateTest, ItReplacesTheModelsOwnAndLeavesNoTrace) {
  ASSERT_THAT(tuned_->AttachFresh(0, 1), IsOk());
  const auto own = tuned_->CopyState(0, 1, 0);
  ASSERT_THAT(tuned_->AttachFresh(0, 2, {}, id_), IsOk());
  const auto tuned = tuned_->CopyState(0, 2, 0);
  ASSERT_THAT(own, IsOk());
  ASSERT_THAT(tuned, IsOk());
  for (size_t layer = 0; layer < own->size(); ++layer) EXPECT_NE((*tuned)[layer], (*own)[layer]) << layer;
  ASSERT_THAT(tuned_->Feed(0, 2, 0, SomeTokens(5, 1)), IsOk());
  ASSERT_THAT(tuned_->AttachFresh(0, 3), IsOk());
  EXPECT_EQ(*tuned_->CopyState(0, 3, 0), *own);
  ASSERT_THAT(tuned_->AttachFresh(0, 4, {}, id_), IsOk());
  EXPECT_EQ(*tuned_->CopyState(0, 4, 0), *tuned);
}

TEST_F(TunedStateTest, AnUnknownOneIsRefusedAndTheSlotStaysAsItWas) {
  ASSERT_THAT(tuned_->AttachFresh(0, 1, {}, id_), IsOk());
  EXPECT_THAT(tuned_->AttachFresh(0, 2, {}, "poet@00000000"),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("no tuned state \"poet@00000000\""), HasSubstr(id_))));
  EXPECT_THAT(tuned_->AttachFresh(0, 2, {}, "poet"), StatusIs(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(tuned_->Feed(0, 1, 0, {1}), IsOk());
  EXPECT_THAT(pipeline_.AttachFresh(0, 1, {}, id_),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("there are: none")));
}

// Prefill equals decodes, one stage equals two, saved and restored equals never stopped; with a neighbour of another
// beginning in the batch.
TEST_F(TunedStateTest, TheLawsHoldFromATunedStart) {
  const std::vector<uint32_t> tokens = SomeTokens(20, 3);
  ASSERT_THAT(tuned_->AttachFresh(0, 1, {}, id_), IsOk());
  const auto whole = tuned_->Feed(0, 1, 0, tokens);
  ASSERT_THAT(whole, IsOk());
  const auto end = tuned_->CopyState(0, 1, tokens.size());
  ASSERT_THAT(end, IsOk());

  EnginePipeline two(model_path_, 2, options_);
  ASSERT_THAT(two.AttachFresh(0, 1, {}, id_), IsOk());
  ASSERT_THAT(two.AttachFresh(1, 2), IsOk());
  std::string logits;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (i == 7) {  // Moved to another slot through its records.
      const auto records = two.CopyState(0, 1, i);
      ASSERT_THAT(records, IsOk());
      ASSERT_THAT(two.Restore(3, 3, i, *records), IsOk());
    }
    const int slot = i < 7 ? 0 : 3;
    const uint64_t sequence = i < 7 ? 1 : 3;
    v1::Step step;
    *step.add_entries() = Entry(1, 2, i, {tokens[i]});
    *step.add_entries() = Entry(slot, sequence, i, {tokens[i]});
    const auto output = two.Step(step);
    ASSERT_THAT(output, IsOk());
    logits += LogitsOf(*output, sequence);
  }
  EXPECT_EQ(logits, LogitsOf(*whole, 1));
  EXPECT_EQ(*two.CopyState(3, 3, tokens.size()), *end);
}

}  // namespace
}  // namespace rwkv::worker
