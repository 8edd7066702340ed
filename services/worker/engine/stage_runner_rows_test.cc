// Rows that go from device to device: what a stage does with its end of such a link, and what becomes of an epoch whose
// link is slow, broken or does not end.
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "prometheus/histogram.h"
#include "rwkv/v1/worker.pb.h"
#include "services/checkpoint/model_config.h"
#include "services/worker/client/worker_client.h"
#include "services/worker/engine/stage_engine.h"
#include "services/worker/engine/stage_runner.h"
#include "services/worker/engine/worker_metrics.h"
#include "services/worker/link/link.h"
#include "services/worker/testing/faulty_runner_fixture.h"
#include "services/worker/testing/scripted_links.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait_until.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// One of several stages is driven.
class StageRunnerRowsTest : public FaultyRunnerFixture {
 protected:
  StageRunnerRowsTest() {
    options_.on_device_lost = [this](const absl::Status& why) { script_.Note(absl::StrCat("lost: ", why.message())); };
    wrap_links_ = [this](std::unique_ptr<LinkTransport> links) -> std::unique_ptr<LinkTransport> {
      return std::make_unique<ScriptedLinks>(&script_, &faults_);
    };
  }
  ~StageRunnerRowsTest() override {
    faults_.GoOn();
    stages_.clear();  // They tell of links until they are gone.
  }

  // Sequence 1 is in slot 0.
  void StartStage(int index, int stages = 2) {
    Start(stages);
    index_ = index;
    Open("e1");
    ASSERT_THAT(stream_->Read(), IsOk());
    Attach();
  }
  void Open(const std::string& epoch) {
    const int stages = static_cast<int>(stages_.size());
    stream_ = clients_[index_]->Execute();
    v1::ExecuteRequest request;
    request.mutable_open()->set_router("router-0");
    request.mutable_open()->set_epoch(epoch);
    request.mutable_open()->set_stage_index(index_);
    request.mutable_open()->set_stage_count(stages);
    if (index_ + 1 < stages) request.mutable_open()->set_next_address("next");
    ASSERT_THAT(stream_->Write(request), IsOk());
  }
  void Attach() {
    v1::ExecuteRequest request;
    request.mutable_attach()->set_sequence(1);
    request.mutable_attach()->set_fresh(true);
    ASSERT_THAT(stream_->Write(request), IsOk());
    ASSERT_THAT(stream_->Read(), IsOk());
  }
  absl::Status WriteStep(uint64_t go_on_until = 0) { return WriteStepOf(tokens_, go_on_until); }
  absl::Status WriteStepOf(const std::vector<uint32_t>& tokens, uint64_t go_on_until = 0, uint64_t id = 1) {
    v1::ExecuteRequest request;
    request.mutable_step()->set_step_id(id);
    *request.mutable_step()->add_entries() = Entry(0, 1, 0, tokens, false, true);
    request.mutable_step()->mutable_entries(0)->set_go_on_until(go_on_until);
    return stream_->Write(request);
  }
  static LinkHeader Header(int64_t rows = 11) {
    LinkHeader header;
    header.step_id = 1;
    header.rows = rows;
    return header;
  }
  static v1::StepResult DrawnAt(uint64_t position) {
    v1::StepResult drawn;
    drawn.add_entries()->set_sequence(1);
    drawn.mutable_entries(0)->set_position(position);
    drawn.mutable_entries(0)->set_token_id(4);
    return drawn;
  }
  const WorkerMetrics& metrics() const { return *stages_[index_].worker_metrics; }

  LinkScript script_;
  int index_ = 0;
  std::unique_ptr<ExecuteStream> stream_;
};

TEST_P(StageRunnerRowsTest, RowsLeaveBehindTheirHeader) {
  StartStage(0);
  ASSERT_THAT(WriteStep(tokens_.size() + 2), IsOk());
  ASSERT_TRUE(script_.WaitForNotes(2));
  EXPECT_THAT(script_.notes(), ElementsAre("sent 11", "output moves 11"));
  // What the last stage drew lets the sequence go on.
  script_.Drawn(DrawnAt(tokens_.size()));
  ASSERT_TRUE(script_.WaitForNotes(4));
  ASSERT_TRUE(rwkv::testing::WaitUntil([this] { return metrics().tokens.Value() == 12; }));
  stream_->Cancel();
  ASSERT_TRUE(IsIdleSoon(index_));
  EXPECT_THAT(script_.notes(),
              ElementsAre("sent 11", "output moves 11", "sent 1 own after 2", "output moves 1", "output ends"));
  const LinkShape shape = stages_[0].engine->link_shape();
  EXPECT_EQ(metrics().link_sent_bytes.Value(),
            12.0 * static_cast<double>(shape.width + shape.v_first_width) * sizeof(float));
  EXPECT_EQ(metrics().send_wait_seconds.Collect().histogram.sample_count, 2);
  EXPECT_EQ(metrics().link_errors.Value(), 0);
}

TEST_P(StageRunnerRowsTest, ALinkThatTakesNoRowsEndsTheEpoch) {
  StartStage(0);
  for (const bool moves : {false, true}) {
    SCOPED_TRACE(moves);
    LinkScript::Answers answers;
    (moves ? answers.move : answers.send) = absl::UnavailableError("the pair is broken");
    script_.Set(answers);
    ASSERT_THAT(WriteStep(), IsOk());
    EXPECT_THAT(stream_->Read().status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("pair is broken")));
    ASSERT_TRUE(IsIdleSoon(index_));
    EXPECT_EQ(metrics().link_errors.Value(), 1);
    EXPECT_EQ(metrics().step_errors.Value(), 0);
    stages_.clear();
    clients_.clear();
    if (!moves) StartStage(0);
  }
}

// The device waits for the other end without end, so the host looks after it.
TEST_P(StageRunnerRowsTest, ALinkThatBreaksWhileAStepWaitsEndsTheEpoch) {
  for (const int index : {0, 1}) {
    SCOPED_TRACE(index);
    script_.Set({});
    StartStage(index);
    faults_.Hang();
    if (index == 1) script_.Push(Header());
    ASSERT_THAT(WriteStep(), IsOk());
    LinkScript::Answers answers;
    answers.check = absl::UnavailableError("the other end is gone");
    script_.Set(answers);
    EXPECT_THAT(stream_->Read().status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("other end is gone")));
    ASSERT_TRUE(IsIdleSoon(index_));
    EXPECT_EQ(metrics().link_errors.Value(), 1);
    EXPECT_EQ(metrics().tokens.Value(), 0);
    EXPECT_EQ(script_.notes().back(), absl::StrCat(index == 0 ? "output" : "input", " ends"));
    stages_.clear();
    clients_.clear();
  }
}

TEST_P(StageRunnerRowsTest, AStepWaitsNoLongerForALinkThanItMay) {
  options_.link_timeout = absl::Milliseconds(50);
  StartStage(0);
  faults_.Hang();
  const absl::Time begin = absl::Now();
  ASSERT_THAT(WriteStep(), IsOk());
  EXPECT_THAT(stream_->Read().status(),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("link: a step waits for 50ms, for a neighbour")));
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(50));
  ASSERT_TRUE(IsIdleSoon(index_));
  EXPECT_EQ(metrics().link_errors.Value(), 1);
  EXPECT_THAT(script_.notes(), ElementsAre("sent 11", "output moves 11", "output ends"));
}

// RWKV-7b waits for its device before it enqueues a step: for a neighbour, too, whose rows are on their way.
class StageRunnerWaitingTest : public StageRunnerRowsTest {
 protected:
  static void SetUpTestSuite() {
    path_ = absl::StrCat(std::getenv("TEST_TMPDIR"), "/waiting.safetensors");
    rwkv::testing::RandomModelOptions options;
    options.version = checkpoint::ModelVersion::k7b;
    options.layers = 2;
    options.width = 32;
    options.head_size = 16;
    options.vocab_size = 67;
    ASSERT_THAT(rwkv::testing::WriteRandomModel(options, path_), IsOk());
  }
};

TEST_P(StageRunnerWaitingTest, AStepThatWaitsBeforeItBeginsWaitsNoLongerForALinkThanItMay) {
  options_.link_timeout = absl::Milliseconds(50);
  StartStage(1);
  faults_.Hang();
  script_.Push(Header());
  ASSERT_THAT(WriteStep(), IsOk());
  EXPECT_THAT(stream_->Read().status(),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("link: a step waits for 50ms, for a neighbour")));
  ASSERT_TRUE(IsIdleSoon(index_));
  EXPECT_EQ(metrics().link_errors.Value(), 1);
  EXPECT_EQ(metrics().step_errors.Value(), 0);
  EXPECT_THAT(script_.notes(), ElementsAre("input moves 11", "input ends"));
}

TEST_P(StageRunnerWaitingTest, ALinkThatBreaksWhileAStepWaitsToBeginEndsTheEpoch) {
  StartStage(1);
  faults_.Hang();
  script_.Push(Header());
  ASSERT_THAT(WriteStep(), IsOk());
  ASSERT_TRUE(script_.WaitForCheck());
  LinkScript::Answers answers;
  answers.check = absl::UnavailableError("the other end is gone");
  script_.Set(answers);
  EXPECT_THAT(stream_->Read().status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("other end is gone")));
  ASSERT_TRUE(IsIdleSoon(index_));
  EXPECT_EQ(metrics().tokens.Value(), 0);
}

TEST_P(StageRunnerWaitingTest, AStepThatWaitsToBeginEndsWithItsEpoch) {
  StartStage(1);
  faults_.Hang();
  script_.Push(Header());
  ASSERT_THAT(WriteStep(), IsOk());
  ASSERT_TRUE(script_.WaitForCheck());
  stream_->Cancel();
  ASSERT_TRUE(IsIdleSoon(index_));
  EXPECT_EQ(metrics().link_errors.Value(), 0);
  EXPECT_EQ(metrics().step_errors.Value(), 0);
}

TEST_P(StageRunnerRowsTest, ALinkThatDoesNotEndIsALostDevice) {
  StartStage(0);
  LinkScript::Answers answers;
  answers.end = absl::DeadlineExceededError("abort of a communicator hangs");
  script_.Set(answers);
  stream_->Cancel();
  ASSERT_TRUE(IsIdleSoon(index_));
  EXPECT_THAT(script_.notes(), ElementsAre("output ends", "lost: abort of a communicator hangs"));
}

TEST_P(StageRunnerRowsTest, ALinkThatEndsWithAnErrorIsNone) {
  StartStage(0);
  LinkScript::Answers answers;
  answers.end = absl::UnavailableError("the other end had left");
  script_.Set(answers);
  stream_->Cancel();
  ASSERT_TRUE(IsIdleSoon(index_));
  EXPECT_THAT(script_.notes(), ElementsAre("output ends"));
}

TEST_P(StageRunnerRowsTest, TheLastStageTakesRowsAndReturnsWhatItDrew) {
  StartStage(1);
  script_.Push(Header());
  ASSERT_THAT(WriteStep(), IsOk());
  const absl::StatusOr<v1::ExecuteResponse> response = stream_->Read();
  ASSERT_THAT(response, IsOk());
  EXPECT_EQ(response->step().step_id(), 1u);
  EXPECT_EQ(response->step().entries(0).position(), tokens_.size());
  EXPECT_THAT(script_.notes(), ElementsAre("input moves 11", "returned 11"));
  EXPECT_EQ(metrics().link_sent_bytes.Value(), 0);
  stream_->Cancel();
  ASSERT_TRUE(IsIdleSoon(index_));
  EXPECT_THAT(script_.notes(), ElementsAre("input moves 11", "returned 11", "input ends"));
}

// Its frames say in which order the first stage has computed them.
TEST_P(StageRunnerRowsTest, StepsOfTheFirstStagesOwnComeBeforeTheRoutersWhereTheirFramesDo) {
  StartStage(1);
  for (uint64_t position : {0, 1}) {
    LinkHeader own = Header(1);
    own.step_id = position + 1;
    *own.own_step.add_entries() = Entry(0, 1, position, {4}, false, true);
    script_.Push(own);
  }
  LinkHeader routers = Header();
  routers.step_id = 3;
  script_.Push(routers);
  v1::ExecuteRequest request;
  request.mutable_step()->set_step_id(1);
  *request.mutable_step()->add_entries() = Entry(0, 1, 2, tokens_, false, true);
  ASSERT_THAT(stream_->Write(request), IsOk());
  for (uint64_t step : {1, 2, 3}) {
    const absl::StatusOr<v1::ExecuteResponse> response = stream_->Read();
    ASSERT_THAT(response, IsOk());
    EXPECT_EQ(response->step().step_id(), step == 3 ? 1 : 0) << "own ones have none";
    EXPECT_EQ(response->step().entries(0).status().code(), 0);
    EXPECT_EQ(response->step().entries(0).position(), step == 3 ? 2 + tokens_.size() : step);
  }
  std::vector<std::string> moves;
  for (const std::string& note : script_.notes()) {
    if (absl::StartsWith(note, "input moves")) moves.push_back(note);
  }
  EXPECT_THAT(moves, ElementsAre("input moves 1", "input moves 1", "input moves 11"));
}

TEST_P(StageRunnerRowsTest, ALastStageThatCannotReturnEndsTheEpoch) {
  StartStage(1);
  LinkScript::Answers answers;
  answers.give_back = absl::UnavailableError("the first stage is gone");
  script_.Set(answers);
  script_.Push(Header());
  ASSERT_THAT(WriteStep(), IsOk());
  EXPECT_THAT(stream_->Read().status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("first stage is gone")));
  ASSERT_TRUE(IsIdleSoon(index_));
  EXPECT_EQ(metrics().link_errors.Value(), 1);
}

TEST_P(StageRunnerRowsTest, AStageBeforeThatDoesNotJoinEndsTheEpoch) {
  LinkScript::Answers answers;
  answers.join = absl::UnavailableError("the stage before did not come");
  script_.Set(answers);
  Start(2);
  index_ = 1;
  Open("e1");
  ASSERT_THAT(stream_->Read(), IsOk()) << "it is open before the stage before is";
  EXPECT_THAT(stream_->Read().status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("did not come")));
}

TEST_P(StageRunnerRowsTest, ANextStageThatIsNotThereEndsTheEpochBeforeItIsOpen) {
  LinkScript::Answers answers;
  answers.connect = absl::UnavailableError("the next stage is not there");
  script_.Set(answers);
  Start(2);
  Open("e1");
  EXPECT_THAT(stream_->Read().status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("is not there")));
  ASSERT_TRUE(IsIdleSoon(index_));
  EXPECT_EQ(metrics().epochs.Value(), 0);
}

TEST_P(StageRunnerRowsTest, AStageBetweenHandsOnWhatWasDrawnOrEndsTheEpoch) {
  StartStage(1, 3);
  script_.Drawn(DrawnAt(7));
  EXPECT_THAT(script_.notes(), ElementsAre("returned 7"));
  LinkScript::Answers answers;
  answers.give_back = absl::UnavailableError("the first stage is gone");
  script_.Set(answers);
  script_.Drawn(DrawnAt(8));
  EXPECT_THAT(stream_->Read().status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("first stage is gone")));
}

// For one more there is no room before the oldest is done, which it never is.
TEST_P(StageRunnerRowsTest, NoStepBeginsInAnEpochThatHasEnded) {
  StartStage(0);
  faults_.Hang();
  script_.HoldSends(true);
  for (uint64_t id = 1; id <= kMaxPendingSteps + 1; ++id) ASSERT_THAT(WriteStepOf({4}, 0, id), IsOk());
  script_.HoldSends(false);
  ASSERT_TRUE(script_.WaitForCheck());
  stream_->Cancel();
  ASSERT_TRUE(IsIdleSoon(index_));
  EXPECT_THAT(script_.notes(), ElementsAre("sent 1", "output moves 1", "sent 1", "output moves 1", "output ends"));
  EXPECT_EQ(metrics().step_errors.Value(), 0);
  EXPECT_EQ(metrics().link_errors.Value(), 0);
}

TEST_P(StageRunnerRowsTest, StepsOfAnEpochThatHasEndedAreForgotten) {
  StartStage(0);
  faults_.Hang();
  ASSERT_THAT(WriteStep(), IsOk());
  ASSERT_TRUE(script_.WaitForNotes(2));
  stream_->Cancel();
  ASSERT_TRUE(IsIdleSoon(index_));
  Open("e2");
  ASSERT_THAT(stream_->Read(), IsOk());
  Attach();
  ASSERT_THAT(WriteStepOf({4}), IsOk());
  ASSERT_TRUE(rwkv::testing::WaitUntil([this] { return metrics().tokens.Value() == 1; }));
  EXPECT_EQ(metrics().decode_step_seconds.Collect().histogram.sample_count, 1);
  EXPECT_EQ(metrics().prefill_step_seconds.Collect().histogram.sample_count, 0) << "that one never ended";
}

INSTANTIATE_TEST_SUITE_P(Devices, StageRunnerRowsTest, ::testing::Values("reference"),
                         [](const ::testing::TestParamInfo<const char*>& info) { return std::string(info.param); });
INSTANTIATE_TEST_SUITE_P(Devices, StageRunnerWaitingTest, ::testing::Values("reference"),
                         [](const ::testing::TestParamInfo<const char*>& info) { return std::string(info.param); });

}  // namespace
}  // namespace rwkv::worker
