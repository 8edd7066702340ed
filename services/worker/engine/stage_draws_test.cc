// A stage whose device draws says what it says where the host draws from the same logits: the same tokens, bits and
// counts, whoever draws beside whom and whatever is pending.
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/engine/stage_engine.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::testing::IsEmpty;

constexpr int kVocab = 61;

class StageDrawsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!kernels::cuda::HasEmulatedDevice()) GTEST_SKIP() << "no CUDA in this build";
    path_ = absl::StrCat(std::getenv("TEST_TMPDIR"), "/draws.safetensors");
    rwkv::testing::RandomModelOptions model;
    model.layers = 2;
    model.width = 32;
    model.head_size = 16;
    model.vocab_size = kVocab;
    ASSERT_THAT(rwkv::testing::WriteRandomModel(model, path_), IsOk());
  }
  void TearDown() override { EXPECT_THAT(kernels::cuda::ViolationsOfEmulatedDevice(), IsEmpty()); }

  std::unique_ptr<StageEngine> MakeEngine() const {
    TestEngineOptions options;
    options.device = std::string(kernels::cuda::kEmulatedDevice);
    absl::StatusOr<std::unique_ptr<StageEngine>> engine = MakeTestEngine(path_, 0, 1, options);
    EXPECT_THAT(engine, IsOk());
    return *std::move(engine);
  }

  static v1::AttachSequence Fresh(int slot, uint64_t sequence) {
    v1::AttachSequence attach;
    attach.set_slot(slot);
    attach.set_sequence(sequence);
    attach.set_fresh(true);
    v1::Sampling& sampling = *attach.mutable_sampling();
    sampling.set_temperature(1.3f);
    sampling.set_seed(5);
    sampling.set_presence_penalty(0.5f);
    sampling.set_frequency_penalty(0.25f);
    sampling.set_top_p(0.95f);
    sampling.set_top_logprobs(3);
    attach.add_banned_token_ids(0);
    attach.add_banned_token_ids(4);
    return attach;
  }

  std::string path_;
};

// All but what says who it is.
std::string DrawOf(const v1::EntryResult& result) {
  v1::EntryResult copy = result;
  copy.clear_slot();
  copy.clear_sequence();
  return copy.SerializeAsString();
}

TEST_F(StageDrawsTest, DeviceAndHostDrawTheSameInOneStep) {
  const std::unique_ptr<StageEngine> engine = MakeEngine();
  for (int slot = 0; slot < 4; ++slot) ASSERT_THAT(engine->Attach(Fresh(slot, slot + 1)), IsOk());
  std::vector<uint32_t> tokens = {7, 3};
  uint64_t position = 0;
  for (uint64_t id = 1; id < 30; ++id) {
    v1::Step step;
    step.set_step_id(id);
    // The host draws where it gets logits, for itself or to score.
    for (int slot = 0; slot < 4; ++slot) {
      *step.add_entries() = Entry(slot, slot + 1, position, tokens, /*logits=*/slot == 1, /*sample=*/true);
    }
    if (tokens.size() > 1) step.mutable_entries(3)->add_score_token_ids(tokens[1]);
    ASSERT_THAT(engine->Enqueue(step, nullptr), IsOk());
    ASSERT_OK_AND_ASSIGN(StepOutput output, engine->Finish());
    ASSERT_EQ(output.result.entries_size(), 4);
    output.result.mutable_entries(3)->clear_scores();
    const v1::EntryResult& drawn = output.result.entries(0);
    ASSERT_EQ(drawn.status().code(), 0) << drawn.status().message();
    ASSERT_TRUE(drawn.has_token_id());
    EXPECT_GE(drawn.token_id(), 4u) << "a banned id";
    EXPECT_EQ(drawn.top_logprobs_size(), 3);
    EXPECT_EQ(output.logits.size(), 1u);
    for (int slot = 1; slot < 4; ++slot) {
      EXPECT_EQ(DrawOf(output.result.entries(slot)), DrawOf(drawn)) << "slot " << slot << " step " << id;
    }
    position += tokens.size();
    tokens.assign(1, drawn.token_id());
  }
}

// A token that was drawn and is not counted yet: the host draws the next one, when it is.
TEST_F(StageDrawsTest, DrawsBehindAPendingOneCountItsToken) {
  std::vector<std::string> results[2];
  for (const int most_pending : {1, 2}) {
    const std::unique_ptr<StageEngine> engine = MakeEngine();
    ASSERT_THAT(engine->Attach(Fresh(0, 1)), IsOk());
    for (uint64_t id = 1; id <= 20; ++id) {
      v1::Step step;
      step.set_step_id(id);
      *step.add_entries() = Entry(0, 1, id - 1, {static_cast<uint32_t>(id % 3)}, false, true);
      ASSERT_THAT(engine->Enqueue(step, nullptr), IsOk());
      while (engine->pending_steps() >= (id == 20 ? 1 : most_pending)) {
        ASSERT_OK_AND_ASSIGN(const StepOutput output, engine->Finish());
        results[most_pending - 1].push_back(output.result.SerializeAsString());
      }
    }
  }
  ASSERT_EQ(results[0].size(), 20u);
  EXPECT_EQ(results[0], results[1]);
}

}  // namespace
}  // namespace rwkv::worker
