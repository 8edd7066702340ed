// Steps behind steps: whatever is enqueued while a step runs, its results are those of a device that runs it at once.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/engine/stage_engine.h"
#include "services/worker/engine/state_copy.h"
#include "services/worker/link/link.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

class PendingStepsTest : public ::testing::TestWithParam<const char*> {
 protected:
  static void SetUpTestSuite() {
    path_ = absl::StrCat(std::getenv("TEST_TMPDIR"), "/pending.safetensors");
    rwkv::testing::RandomModelOptions model;
    model.layers = 4;
    model.width = 32;
    model.head_size = 16;
    model.vocab_size = 61;
    ASSERT_THAT(rwkv::testing::WriteRandomModel(model, path_), IsOk());
  }

  std::unique_ptr<StageEngine> MakeEngine(const std::string& device, int stage = 0, int stages = 1) const {
    TestEngineOptions options;
    options.device = device;
    options.max_batch_tokens = 10;
    absl::StatusOr<std::unique_ptr<StageEngine>> engine = MakeTestEngine(path_, stage, stages, options);
    EXPECT_THAT(engine, IsOk());
    return *std::move(engine);
  }

  static v1::AttachSequence Fresh(int slot, uint64_t sequence, const v1::Sampling& sampling = {}) {
    v1::AttachSequence attach;
    attach.set_slot(slot);
    attach.set_sequence(sequence);
    attach.set_fresh(true);
    *attach.mutable_sampling() = sampling;
    return attach;
  }

  static v1::Step StepOf(uint64_t id, const std::vector<v1::StepEntry>& entries) {
    v1::Step step;
    step.set_step_id(id);
    for (const v1::StepEntry& entry : entries) *step.add_entries() = entry;
    return step;
  }

  static v1::SaveSnapshot SaveOf(int slot, uint64_t sequence, uint64_t position) {
    v1::SaveSnapshot save;
    save.set_slot(slot);
    save.set_sequence(sequence);
    save.set_expected_position(position);
    return save;
  }

  static std::string BytesOf(const StateCopy& copy) {
    const absl::StatusOr<std::vector<absl::Span<const char>>> records = copy.Records(0);
    EXPECT_THAT(records, IsOk());
    std::string bytes;
    if (records.ok()) {
      for (absl::Span<const char> record : *records) bytes.append(record.data(), record.size());
    }
    return bytes;
  }

  // What a sequence of steps gives when each is finished before the next one begins.
  std::vector<std::string> Expected(const std::vector<v1::Step>& steps,
                                    const std::vector<v1::AttachSequence>& attached) {
    const std::unique_ptr<StageEngine> engine = MakeEngine("auto");
    for (const v1::AttachSequence& attach : attached) EXPECT_THAT(engine->Attach(attach), IsOk());
    std::vector<std::string> results;
    for (const v1::Step& step : steps) {
      EXPECT_THAT(engine->Enqueue(step, nullptr), IsOk());
      results.push_back(Serialized(engine->Finish()));
    }
    return results;
  }

  static std::string Serialized(const absl::StatusOr<StepOutput>& output) {
    EXPECT_THAT(output, IsOk());
    if (!output.ok()) return "";
    std::string bytes = output->result.SerializeAsString();
    for (const v1::LogitsRows& rows : output->logits) bytes += rows.SerializeAsString();
    return bytes;
  }

  static std::string path_;
};

std::string PendingStepsTest::path_;

TEST_P(PendingStepsTest, TwoStepsAtATimeGiveTheResultsOfOneAtATime) {
  v1::Sampling sampling;
  sampling.set_temperature(1.2f);
  sampling.set_seed(5);
  sampling.set_presence_penalty(0.5f);
  const std::vector<v1::AttachSequence> attached = {Fresh(0, 1, sampling), Fresh(1, 2)};
  std::vector<v1::Step> steps;
  for (uint64_t i = 0; i < 9; ++i) {
    const std::vector<uint32_t> tokens = {static_cast<uint32_t>(7 * i % 61), static_cast<uint32_t>(3 * i % 61)};
    std::vector<v1::StepEntry> entries = {Entry(0, 1, 2 * i, tokens, i % 2 == 0, true),
                                          Entry(1, 2, i, {static_cast<uint32_t>(i)}, true)};
    entries[1].set_hidden_sum(true);
    entries[1].set_wkv_state(i % 3 == 0);
    // A refused one between them, whose position tells what was enqueued, not what has run.
    if (i % 4 == 1) entries.insert(entries.begin() + 1, Entry(1, 2, 99, {1, 2, 3}));
    steps.push_back(StepOf(i + 1, entries));
  }
  const std::vector<std::string> expected = Expected(steps, attached);

  const std::unique_ptr<StageEngine> engine = MakeEngine(GetParam());
  for (const v1::AttachSequence& attach : attached) ASSERT_THAT(engine->Attach(attach), IsOk());
  ASSERT_THAT(engine->Enqueue(steps[0], nullptr), IsOk());
  for (size_t i = 0; i < steps.size(); ++i) {
    EXPECT_EQ(engine->pending_steps(), 1);
    if (i + 1 < steps.size()) ASSERT_THAT(engine->Enqueue(steps[i + 1], nullptr), IsOk());
    EXPECT_EQ(Serialized(engine->Finish()), expected[i]) << "step " << i + 1;
    EXPECT_EQ(engine->IsOldestDone() || engine->pending_steps() == 0,
              GetParam() != std::string(kLazyDevice) || engine->pending_steps() == 0);
  }
  EXPECT_EQ(engine->pending_steps(), 0);
}

// The slot goes to another sequence, with another sampling, before the step's results are taken up.
TEST_P(PendingStepsTest, AStepAnswersForTheHolderItWasEnqueuedFor) {
  v1::Sampling hot;
  hot.set_temperature(2);
  hot.set_seed(11);
  const std::vector<v1::Step> steps = {StepOf(1, {Entry(0, 1, 0, {4, 5}, false, true)}),
                                       StepOf(2, {Entry(0, 2, 0, {6}, false, true)})};
  const std::string first = Expected({steps[0]}, {Fresh(0, 1, hot)})[0];
  v1::Step alone = steps[1];
  alone.set_step_id(1);
  v1::StepResult second;
  second.ParseFromString(Expected({alone}, {Fresh(0, 2)})[0]);
  second.set_step_id(2);

  const std::unique_ptr<StageEngine> engine = MakeEngine(GetParam());
  ASSERT_THAT(engine->Attach(Fresh(0, 1, hot)), IsOk());
  ASSERT_THAT(engine->Enqueue(steps[0], nullptr), IsOk());
  v1::ReleaseSlot release;
  release.set_slot(0);
  release.set_sequence(1);
  engine->Release(release);
  ASSERT_THAT(engine->Attach(Fresh(0, 2)), IsOk());
  engine->Release(release);  // Late: the slot is another's.
  EXPECT_EQ(engine->slots_used(), 1);
  ASSERT_THAT(engine->Enqueue(steps[1], nullptr), IsOk());
  EXPECT_EQ(Serialized(engine->Finish()), first);
  EXPECT_EQ(Serialized(engine->Finish()), second.SerializeAsString());
}

// A save is of the position it names, whatever is enqueued behind it, and changes nothing.
TEST_P(PendingStepsTest, ASaveBetweenTwoStepsIsTheStateBetweenThem) {
  const std::vector<v1::Step> steps = {StepOf(1, {Entry(0, 1, 0, {4, 5, 6}), Entry(1, 2, 0, {9})}),
                                       StepOf(2, {Entry(0, 1, 3, {7}), Entry(1, 2, 1, {3})}),
                                       StepOf(3, {Entry(0, 1, 4, {8, 2}), Entry(1, 2, 2, {5})})};
  const std::vector<v1::AttachSequence> attached = {Fresh(0, 1), Fresh(1, 2)};
  const std::vector<std::string> expected = Expected(steps, attached);

  const std::unique_ptr<StageEngine> engine = MakeEngine(GetParam());
  for (const v1::AttachSequence& attach : attached) ASSERT_THAT(engine->Attach(attach), IsOk());
  ASSERT_THAT(engine->Enqueue(steps[0], nullptr), IsOk());
  const auto between = engine->CopyState(SaveOf(0, 1, 3));
  ASSERT_THAT(between, IsOk());
  EXPECT_THAT(engine->CopyState(SaveOf(0, 1, 0)).status(), StatusIs(absl::StatusCode::kAborted));
  ASSERT_THAT(engine->Enqueue(steps[1], nullptr), IsOk());
  EXPECT_EQ(Serialized(engine->Finish()), expected[0]);
  EXPECT_EQ(Serialized(engine->Finish()), expected[1]);

  // Restored in another slot, it goes on as the one that never stopped.
  const std::unique_ptr<StageEngine> other = MakeEngine(GetParam());
  const absl::StatusOr<std::vector<absl::Span<const char>>> spans = (*between)->Records(0);
  ASSERT_THAT(spans, IsOk());
  std::vector<std::string> records;
  for (absl::Span<const char> record : *spans) records.emplace_back(record.data(), record.size());
  v1::AttachSequence attach;
  attach.set_slot(5);
  attach.set_sequence(1);
  attach.set_position(3);
  *attach.mutable_snapshot() = ManifestOf("s", 3, records);
  ASSERT_THAT(other->Attach(attach), IsOk());
  ASSERT_THAT(Install(*other, 5, 1, records), IsOk());
  // The next one to come is written elsewhere while the stream still reads this one.
  const absl::StatusOr<std::shared_ptr<StateCopy>> next = other->copies().Take();
  ASSERT_THAT(next, IsOk());
  std::memset((*next)->values(), 0, other->copies().bytes());
  ASSERT_THAT(other->Enqueue(StepOf(1, {Entry(5, 1, 3, {7})}), nullptr), IsOk());
  ASSERT_THAT(other->Enqueue(StepOf(2, {Entry(5, 1, 4, {8, 2})}), nullptr), IsOk());
  ASSERT_THAT(other->Finish(), IsOk());
  const absl::StatusOr<StepOutput> restored = other->Finish();
  ASSERT_THAT(restored, IsOk());
  ASSERT_THAT(engine->Enqueue(steps[2], nullptr), IsOk());
  const absl::StatusOr<StepOutput> whole = engine->Finish();
  ASSERT_THAT(whole, IsOk());
  EXPECT_EQ(LogitsOf(*restored, 1), LogitsOf(*whole, 1));
  const auto end = engine->CopyState(SaveOf(0, 1, 6));
  const auto restored_end = other->CopyState(SaveOf(5, 1, 6));
  ASSERT_THAT(end, IsOk());
  ASSERT_THAT(restored_end, IsOk());
  EXPECT_EQ(BytesOf(**restored_end), BytesOf(**end));
}

TEST_P(PendingStepsTest, ThirdStepsAndFinishedOnesThatAreNoneAreErrors) {
  const std::unique_ptr<StageEngine> engine = MakeEngine(GetParam());
  EXPECT_THAT(engine->Finish().status(), StatusIs(absl::StatusCode::kInternal, HasSubstr("no step")));
  ASSERT_THAT(engine->Enqueue(StepOf(1, {}), nullptr), IsOk());
  ASSERT_THAT(engine->Enqueue(StepOf(2, {}), nullptr), IsOk());
  EXPECT_THAT(engine->Enqueue(StepOf(3, {}), nullptr),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("step 3 behind 2 pending ones")));
  ASSERT_THAT(engine->Finish(), IsOk());
  ASSERT_THAT(engine->Reset(), IsOk());
  EXPECT_EQ(engine->pending_steps(), 0);
  EXPECT_THAT(engine->Enqueue(StepOf(1, {}), nullptr), IsOk());
}

// The rows of refused entries stay, so that their number follows from the step.
TEST_P(PendingStepsTest, RefusedRowsArePadding) {
  const std::unique_ptr<StageEngine> first = MakeEngine(GetParam(), 0, 2);
  const std::unique_ptr<StageEngine> second = MakeEngine(GetParam(), 1, 2);
  for (StageEngine* stage : {first.get(), second.get()}) ASSERT_THAT(stage->Attach(Fresh(0, 1)), IsOk());
  // The second entry's slot holds nothing, the third has no room, the fourth no tokens.
  const v1::Step step = StepOf(1, {Entry(0, 1, 0, {1, 2}), Entry(1, 9, 0, {3, 4, 5}),
                                   Entry(2, 9, 0, std::vector<uint32_t>(6, 1)), Entry(3, 9, 0, {})});
  ASSERT_THAT(first->Enqueue(step, nullptr), IsOk());
  const absl::StatusOr<StepOutput> output = first->Finish();
  ASSERT_THAT(output, IsOk());
  EXPECT_EQ(output->frame.header.rows, 5);
  EXPECT_EQ(output->rows, 2);
  ASSERT_EQ(output->frame.header.refused.size(), 3u);
  // A frame with other rows contradicts the step.
  LinkFrame wrong = *Pass(output->frame, *second);
  wrong.header.rows = 2;
  EXPECT_THAT(second->Enqueue(step, &wrong), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("has 5 and 3")));

  const std::unique_ptr<StageEngine> last = MakeEngine(GetParam(), 1, 2);
  ASSERT_THAT(last->Attach(Fresh(0, 1)), IsOk());
  ASSERT_THAT(last->Enqueue(step, Pass(output->frame, *last)), IsOk());
  const absl::StatusOr<StepOutput> result = last->Finish();
  ASSERT_THAT(result, IsOk());
  const std::vector<std::string> alone = Expected({StepOf(1, {Entry(0, 1, 0, {1, 2})})}, {Fresh(0, 1)});
  EXPECT_EQ(result->result.entries_size(), 4);
  EXPECT_THAT(alone[0], HasSubstr(LogitsOf(*result, 1))) << "as without them";
}

INSTANTIATE_TEST_SUITE_P(Devices, PendingStepsTest, ::testing::Values("auto", kLazyDevice, kProtectedDevice),
                         [](const ::testing::TestParamInfo<const char*>& info) { return std::string(info.param); });

}  // namespace
}  // namespace rwkv::worker
