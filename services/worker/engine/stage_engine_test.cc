// What attaches, slots and entries of steps may be, and what others get.
#include "services/worker/engine/stage_engine.h"

#include <cstring>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "services/checkpoint/model_tensors.h"
#include "services/worker/link/link.h"
#include "services/worker/testing/small_model.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::checkpoint::ModelVersion;
using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class StageEngineTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { path_ = WriteSmallModel(); }

  StageEngineTest() : pipeline_(path_, 2, Options()) {}

  static TestEngineOptions Options() {
    TestEngineOptions options;
    options.slots = 4;
    options.max_batch_tokens = 10;
    return options;
  }

  // Of a layer: two shift states of 40, two heads of 20 x 20.
  static size_t RecordBytes() { return (40 + 2 * 20 * 20 + 40) * sizeof(float); }

  static std::string path_;
  EnginePipeline pipeline_;
};

std::string StageEngineTest::path_;

TEST_F(StageEngineTest, AnEntryThatDoesNotFitIsRefusedAndItsNeighbourIsNot) {
  struct Row {
    const char* name;
    void (*spoil)(v1::StepEntry&);
    absl::StatusCode code;
    const char* says;
    RefusalCause cause;
  };
  const Row rows[] = {
      {"position behind", [](v1::StepEntry& e) { e.set_expected_position(2); }, absl::StatusCode::kAborted,
       "slot 1 is at position 3", RefusalCause::kPosition},
      {"position ahead", [](v1::StepEntry& e) { e.set_expected_position(4); }, absl::StatusCode::kAborted, "expects 4",
       RefusalCause::kPosition},
      {"foreign sequence", [](v1::StepEntry& e) { e.set_sequence(8); }, absl::StatusCode::kAborted,
       "slot 1 holds another sequence, not sequence 8", RefusalCause::kSequence},
      {"free slot", [](v1::StepEntry& e) { e.set_slot(3); }, absl::StatusCode::kAborted, "slot 3 holds nothing",
       RefusalCause::kSequence},
      {"slot beyond the pool", [](v1::StepEntry& e) { e.set_slot(4); }, absl::StatusCode::kInvalidArgument,
       "slot 4 is outside the pool of 4", RefusalCause::kSlot},
      {"negative slot", [](v1::StepEntry& e) { e.set_slot(-1); }, absl::StatusCode::kInvalidArgument, "slot -1",
       RefusalCause::kSlot},
      {"token beyond the vocabulary", [](v1::StepEntry& e) { e.set_token_ids(0, kSmallVocabulary); },
       absl::StatusCode::kInvalidArgument, "token id 61 is not below 61", RefusalCause::kTokens},
      {"huge token", [](v1::StepEntry& e) { e.set_token_ids(0, 0xffffffff); }, absl::StatusCode::kInvalidArgument,
       "token id 4294967295", RefusalCause::kTokens},
      {"no tokens", [](v1::StepEntry& e) { e.clear_token_ids(); }, absl::StatusCode::kInvalidArgument, "without tokens",
       RefusalCause::kTokens},
      {"too many rows",
       [](v1::StepEntry& e) {
         for (int i = 0; i < 9; ++i) e.add_token_ids(1);
       },
       absl::StatusCode::kInvalidArgument, "10 rows after 1", RefusalCause::kRows},
      {"scored token beyond the vocabulary", [](v1::StepEntry& e) { e.add_score_token_ids(kSmallVocabulary); },
       absl::StatusCode::kInvalidArgument, "token id 61", RefusalCause::kTokens},
      {"too many scores",
       [](v1::StepEntry& e) {
         e.add_score_token_ids(1);
         e.add_score_token_ids(1);
       },
       absl::StatusCode::kInvalidArgument, "2 scores for 1 tokens", RefusalCause::kTokens},
      {"slot twice",
       [](v1::StepEntry& e) {
         e.set_slot(0);
         e.set_sequence(1);
         e.set_expected_position(3);
       },
       absl::StatusCode::kInvalidArgument, "slot 0 is in the step twice", RefusalCause::kSlot},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    EnginePipeline pipeline(path_, 2, Options());
    for (int slot : {0, 1, 2}) {
      ASSERT_THAT(pipeline.AttachFresh(slot, slot + 1), IsOk());
      ASSERT_THAT(pipeline.Feed(slot, slot + 1, 0, {4, 5, 6}), IsOk());
    }
    const auto before = pipeline.CopyState(1, 2, 3);
    ASSERT_THAT(before, IsOk());
    v1::Step step;
    *step.add_entries() = Entry(0, 1, 3, {7}, true, true);
    *step.add_entries() = Entry(1, 2, 3, {7}, true, true);
    *step.add_entries() = Entry(2, 3, 3, {7}, true, true);
    row.spoil(*step.mutable_entries(1));
    const absl::StatusOr<StepOutput> output = pipeline.Step(step);
    ASSERT_THAT(output, IsOk());
    ASSERT_EQ(output->result.entries_size(), 3);
    EXPECT_THAT(StatusOf(output->result.entries(1)), StatusIs(row.code, HasSubstr(row.says)));
    EXPECT_FALSE(output->result.entries(1).has_token_id());
    EXPECT_THAT(output->refused_here, ElementsAre(row.cause)) << "by the first stage, once";
    EXPECT_THAT(StatusOf(output->result.entries(0)), IsOk());
    EXPECT_THAT(StatusOf(output->result.entries(2)), IsOk());
    EXPECT_EQ(LogitsOf(*output, 1), LogitsOf(*output, 3)) << "the same tokens in two slots";
    EXPECT_EQ(output->result.entries(2).position(), 4u);
    // What was refused has changed nothing.
    const auto after = pipeline.CopyState(1, 2, 3);
    ASSERT_THAT(after, IsOk());
    EXPECT_EQ(*after, *before);
  }
}

TEST_F(StageEngineTest, AnEntryThatOnlyALaterStageRefusesIsSkippedAfterIt) {
  EnginePipeline pipeline(path_, 3, Options());
  for (int slot : {0, 1}) ASSERT_THAT(pipeline.AttachFresh(slot, slot + 1), IsOk());
  // Stage 1 has lost the slot.
  v1::ReleaseSlot release;
  release.set_slot(0);
  release.set_sequence(1);
  pipeline.stage(1).Release(release);
  v1::Step step;
  *step.add_entries() = Entry(0, 1, 0, {1, 2}, true, true);
  *step.add_entries() = Entry(1, 2, 0, {3, 4, 5}, true, true);
  const absl::StatusOr<StepOutput> output = pipeline.Step(step);
  ASSERT_THAT(output, IsOk());
  EXPECT_THAT(StatusOf(output->result.entries(0)), StatusIs(absl::StatusCode::kAborted));
  ASSERT_THAT(StatusOf(output->result.entries(1)), IsOk());
  EnginePipeline alone(path_, 1, Options());
  ASSERT_THAT(alone.AttachFresh(0, 2), IsOk());
  EXPECT_EQ(LogitsOf(*output, 2), LogitsOf(*alone.Feed(0, 2, 0, {3, 4, 5}), 2));
  // The stages now stand at different positions: the sequence is refused for good, wherever it claims to be.
  EXPECT_THAT(pipeline.Feed(0, 1, 2, {1}).status(), StatusIs(absl::StatusCode::kAborted));
  EXPECT_THAT(pipeline.Feed(0, 1, 0, {1}).status(), StatusIs(absl::StatusCode::kAborted));
}

TEST_F(StageEngineTest, AStepWhoseEntriesAreAllRefusedPasses) {
  v1::Step step;
  *step.add_entries() = Entry(0, 1, 0, {1});
  const absl::StatusOr<StepOutput> output = pipeline_.Step(step);
  ASSERT_THAT(output, IsOk());
  EXPECT_THAT(StatusOf(output->result.entries(0)), StatusIs(absl::StatusCode::kAborted));
  EXPECT_THAT(pipeline_.Step(v1::Step()), IsOk()) << "no entries at all";
}

TEST_F(StageEngineTest, StepsAndTheirInputMustFollowEachOther) {
  StageEngine& first = pipeline_.stage(0);
  StageEngine& second = pipeline_.stage(1);
  v1::Step step;
  step.set_step_id(2);
  EXPECT_THAT(first.Enqueue(step, nullptr), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("step 2")));
  step.set_step_id(1);
  LinkFrame input;
  EXPECT_THAT(first.Enqueue(step, &input), StatusIs(absl::StatusCode::kInternal));
  EXPECT_THAT(second.Enqueue(step, nullptr), StatusIs(absl::StatusCode::kInternal));
  input.header.step_id = 2;
  EXPECT_THAT(second.Enqueue(step, &input), StatusIs(absl::StatusCode::kInvalidArgument));
  input.header.step_id = 1;
  input.header.rows = 1;
  EXPECT_THAT(second.Enqueue(step, &input), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("1 rows")));
}

TEST_F(StageEngineTest, ASlotIsCleanWhenGivenOut) {
  ASSERT_THAT(pipeline_.AttachFresh(2, 1), IsOk());
  const absl::StatusOr<StepOutput> first = pipeline_.Feed(2, 1, 0, {5, 6});
  ASSERT_THAT(first, IsOk());
  ASSERT_THAT(pipeline_.AttachFresh(2, 2), IsOk());
  const absl::StatusOr<StepOutput> second = pipeline_.Feed(2, 2, 0, {5, 6});
  ASSERT_THAT(second, IsOk());
  EXPECT_EQ(LogitsOf(*first, 1), LogitsOf(*second, 2));
  // The old holder is out.
  EXPECT_THAT(pipeline_.Feed(2, 1, 2, {5}).status(), StatusIs(absl::StatusCode::kAborted));
}

// The one before was released, or is about to be: whose word comes late frees nobody else's slot.
TEST_F(StageEngineTest, ALateReleaseFreesNoOthersSlot) {
  ASSERT_THAT(pipeline_.AttachFresh(2, 1), IsOk());
  ASSERT_THAT(pipeline_.AttachFresh(2, 2), IsOk());
  v1::ReleaseSlot release;
  release.set_slot(2);
  release.set_sequence(1);
  for (int stage : {0, 1}) pipeline_.stage(stage).Release(release);
  EXPECT_THAT(pipeline_.Feed(2, 2, 0, {5}), IsOk());
  release.set_slot(9);  // No such slot.
  for (int stage : {0, 1}) pipeline_.stage(stage).Release(release);
  release.set_slot(2);
  release.set_sequence(2);
  for (int stage : {0, 1}) pipeline_.stage(stage).Release(release);
  EXPECT_EQ(pipeline_.stage(0).slots_used(), 0);
  EXPECT_THAT(pipeline_.Feed(2, 2, 1, {5}).status(), StatusIs(absl::StatusCode::kAborted));
}

TEST_F(StageEngineTest, AWarmSlotGoesOnAndAnotherPlaceIsAborted) {
  ASSERT_THAT(pipeline_.AttachFresh(0, 1), IsOk());
  const std::string whole = FeedInChunks(pipeline_, 0, 1, 0, {1, 2, 3, 4}, 4);
  ASSERT_THAT(pipeline_.AttachFresh(1, 2), IsOk());
  std::string parts = FeedInChunks(pipeline_, 1, 2, 0, {1, 2}, 2);
  v1::AttachSequence warm;
  warm.set_slot(1);
  warm.set_sequence(3);
  warm.set_warm_sequence(2);
  warm.set_position(1);
  EXPECT_THAT(pipeline_.Attach(warm),
              StatusIs(absl::StatusCode::kAborted, HasSubstr("slot 1 does not hold sequence 2")));
  warm.set_position(2);
  warm.set_slot(0);
  EXPECT_THAT(pipeline_.Attach(warm), StatusIs(absl::StatusCode::kAborted));
  warm.set_slot(1);
  ASSERT_THAT(pipeline_.Attach(warm), IsOk());
  parts += FeedInChunks(pipeline_, 1, 3, 2, {3, 4}, 2);
  EXPECT_EQ(parts, whole);
}

TEST_F(StageEngineTest, AnAttachThatCannotBeLeavesTheSlotAsItWas) {
  struct Row {
    const char* name;
    void (*spoil)(v1::AttachSequence&);
    absl::StatusCode code;
  };
  const Row rows[] = {
      {"slot", [](v1::AttachSequence& a) { a.set_slot(4); }, absl::StatusCode::kInvalidArgument},
      {"position of a fresh one", [](v1::AttachSequence& a) { a.set_position(3); }, absl::StatusCode::kInvalidArgument},
      {"no source", [](v1::AttachSequence& a) { a.clear_source(); }, absl::StatusCode::kInvalidArgument},
      {"sampling", [](v1::AttachSequence& a) { a.mutable_sampling()->set_top_p(-1); },
       absl::StatusCode::kInvalidArgument},
      {"turn token", [](v1::AttachSequence& a) { a.add_turn_token_ids(kSmallVocabulary); },
       absl::StatusCode::kInvalidArgument},
      {"banned pairs", [](v1::AttachSequence& a) { a.add_banned_token_ids(3); }, absl::StatusCode::kInvalidArgument},
      {"model", [](v1::AttachSequence& a) { a.mutable_snapshot()->set_model_fingerprint("other"); },
       absl::StatusCode::kFailedPrecondition},
      {"missing records", [](v1::AttachSequence& a) { *a.mutable_snapshot() = ManifestOf("s", 0, {}); },
       absl::StatusCode::kDataLoss},
      {"records of a wrong size",
       [](v1::AttachSequence& a) {
         *a.mutable_snapshot() = ManifestOf("s", 0, {"a", "b", "c", "d"});
       },
       absl::StatusCode::kDataLoss},
      {"a record of another snapshot",
       [](v1::AttachSequence& a) {
         const std::string record(RecordBytes(), '\0');
         *a.mutable_snapshot() = ManifestOf("s", 0, {record, record, record, record});
         a.mutable_snapshot()->mutable_records(2)->set_snapshot_id("t");
       },
       absl::StatusCode::kDataLoss},
      {"records out of order",
       [](v1::AttachSequence& a) {
         const std::string record(RecordBytes(), '\0');
         *a.mutable_snapshot() = ManifestOf("s", 0, {record, record, record, record});
         a.mutable_snapshot()->mutable_records(2)->set_layer(1);
       },
       absl::StatusCode::kDataLoss},
      {"snapshot at another position", [](v1::AttachSequence& a) { *a.mutable_snapshot() = ManifestOf("s", 5, {}); },
       absl::StatusCode::kInvalidArgument},
  };
  ASSERT_THAT(pipeline_.AttachFresh(1, 7), IsOk());
  ASSERT_THAT(pipeline_.Feed(1, 7, 0, {1}), IsOk());
  uint64_t position = 1;
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    v1::AttachSequence attach;
    attach.set_slot(1);
    attach.set_sequence(8);
    attach.set_fresh(true);
    row.spoil(attach);
    EXPECT_THAT(pipeline_.stage(0).Attach(attach), StatusIs(row.code));
    EXPECT_THAT(pipeline_.Feed(1, 7, position++, {1}), IsOk());
  }
}

TEST_F(StageEngineTest, AReservedSlotComputesNothingUntilItsStateIsThere) {
  ASSERT_THAT(pipeline_.AttachFresh(0, 1), IsOk());
  ASSERT_THAT(pipeline_.Feed(0, 1, 0, {1, 2}), IsOk());
  const auto records = pipeline_.CopyState(0, 1, 2);
  ASSERT_THAT(records, IsOk());
  StageEngine& first = pipeline_.stage(0);
  v1::AttachSequence attach;
  attach.set_slot(1);
  attach.set_sequence(2);
  attach.set_position(2);
  *attach.mutable_snapshot() = ManifestOf("s", 2, *records);
  const std::vector<std::string> mine(records->begin(), records->begin() + 2);
  ASSERT_THAT(pipeline_.Attach(attach), IsOk());
  EXPECT_EQ(first.slots_used(), 2);
  EXPECT_THAT(pipeline_.Feed(1, 2, 2, {1}).status(), StatusIs(absl::StatusCode::kAborted, HasSubstr("loading")));

  // Nor may another sequence go on from a state that is not there.
  v1::AttachSequence warm;
  warm.set_slot(1);
  warm.set_sequence(4);
  warm.set_warm_sequence(2);
  warm.set_position(2);
  EXPECT_THAT(first.Attach(warm), StatusIs(absl::StatusCode::kAborted, HasSubstr("does not hold sequence 2")));

  // Given away meanwhile: what comes is dropped.
  v1::ReleaseSlot release;
  release.set_slot(1);
  release.set_sequence(2);
  first.Release(release);
  EXPECT_THAT(Install(first, 1, 2, mine), StatusIs(absl::StatusCode::kAborted));
  ASSERT_THAT(first.Attach(attach), IsOk());
  attach.set_sequence(3);
  ASSERT_THAT(first.Attach(attach), IsOk());
  EXPECT_THAT(Install(first, 1, 2, mine), StatusIs(absl::StatusCode::kAborted));
  // Spoilt records free the slot.
  std::vector<std::string> spoilt = mine;
  std::memset(spoilt[1].data(), 0xff, 4);  // A NaN.
  EXPECT_THAT(Install(first, 1, 3, spoilt), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("layer 1 is not finite")));
  EXPECT_EQ(first.slots_used(), 1);
  ASSERT_THAT(first.Attach(attach), IsOk());
  first.AbandonLoad(1, 2);
  EXPECT_EQ(first.slots_used(), 2) << "not its slot";
  first.AbandonLoad(1, 3);
  EXPECT_EQ(first.slots_used(), 1);
  // And in the end it works.
  ASSERT_THAT(first.Attach(attach), IsOk());
  EXPECT_THAT(Install(first, 1, 3, mine), IsOk());
}

TEST_F(StageEngineTest, SavesOnlyTheStateThatIsMeant) {
  ASSERT_THAT(pipeline_.AttachFresh(0, 1), IsOk());
  ASSERT_THAT(pipeline_.Feed(0, 1, 0, {1, 2}), IsOk());
  EXPECT_THAT(pipeline_.CopyState(0, 1, 1).status(), StatusIs(absl::StatusCode::kAborted));
  EXPECT_THAT(pipeline_.CopyState(0, 2, 2).status(), StatusIs(absl::StatusCode::kAborted));
  EXPECT_THAT(pipeline_.CopyState(9, 1, 2).status(), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(pipeline_.CopyState(0, 1, 2), IsOk());
}

TEST_F(StageEngineTest, ResetFreesEverySlotAndStartsTheStepsAnew) {
  ASSERT_THAT(pipeline_.AttachFresh(0, 1), IsOk());
  ASSERT_THAT(pipeline_.Feed(0, 1, 0, {1, 2}), IsOk());
  EnginePipeline fresh(path_, 1, Options());
  ASSERT_THAT(fresh.stage(0).Reset(), IsOk());
  EXPECT_EQ(fresh.stage(0).slots_used(), 0);
  ASSERT_THAT(fresh.stage(0).WarmUp(), IsOk());
  EXPECT_EQ(fresh.stage(0).slots_used(), 0);
  ASSERT_THAT(fresh.AttachFresh(0, 1), IsOk());
  EXPECT_THAT(fresh.Feed(0, 1, 0, {1, 2}), IsOk());
}

// T3 in small: a turn that was cut and attached again, with the tokens it had generated, draws what it would have
// drawn.
// RWKV-7b's caches hold a fixed number of tokens; everything else has no end.
TEST_F(StageEngineTest, WhatPassesTheContextIsRefusedBeforeItIsComputed) {
  TestEngineOptions options = Options();
  options.deep_embed_context = 8;  // Less than a full batch: the warm-up must fit, too.
  EnginePipeline pipeline(WriteSmallModel(ModelVersion::k7b), 2, options);
  for (int stage : {0, 1}) ASSERT_THAT(pipeline.stage(stage).WarmUp(), IsOk());
  ASSERT_THAT(pipeline.AttachFresh(0, 1), IsOk());
  ASSERT_THAT(pipeline.Feed(0, 1, 0, SomeTokens(5, 1)), IsOk());
  const auto before = pipeline.CopyState(0, 1, 5);
  ASSERT_THAT(before, IsOk());
  EXPECT_THAT(pipeline.Feed(0, 1, 5, SomeTokens(4, 2)).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       HasSubstr("4 tokens after 5 pass the model's context of 8 tokens")));
  EXPECT_EQ(*pipeline.CopyState(0, 1, 5), *before);
  EXPECT_THAT(pipeline.Feed(0, 1, 5, SomeTokens(3, 2)), IsOk());
  EXPECT_THAT(pipeline.Feed(0, 1, 8, {1}).status(), StatusIs(absl::StatusCode::kFailedPrecondition));
}

}  // namespace
}  // namespace rwkv::worker
