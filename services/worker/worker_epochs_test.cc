// Epochs of whole workers over real gRPC: steps under way, whoever breaks off, bad input.
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "grpcpp/client_context.h"
#include "grpcpp/support/sync_stream.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.grpc.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/common/channel.h"
#include "services/worker/testing/pipeline_driver.h"
#include "services/worker/testing/test_engine.h"
#include "services/worker/worker.h"
#include "services/worker/worker_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait_until.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

TEST_F(WorkerTest, StepsUnderWayAreAnsweredInOrder) {
  Start(3);
  PipelineDriver driver = MakeDriver();
  ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
  constexpr int kSteps = 40;
  for (int slot = 0; slot < kSteps; ++slot) ASSERT_THAT(driver.AttachFresh(slot, 100 + slot), IsOk());
  for (int slot = 0; slot < kSteps; ++slot) {
    v1::Step step;
    *step.add_entries() = Entry(slot, 100 + slot, 0, tokens_, false, true);
    ASSERT_THAT(driver.WriteStep(std::move(step)), IsOk());
  }
  for (int slot = 0; slot < kSteps; ++slot) {
    const absl::StatusOr<DrivenStep> step = driver.ReadStep();
    ASSERT_THAT(step, IsOk());
    EXPECT_EQ(step->result.step_id(), slot + 1u);
    EXPECT_EQ(step->result.entries(0).sequence(), 100u + slot);
    EXPECT_EQ(step->result.entries(0).status().code(), 0);
  }
}

// More than a stream holds unsent: what has left makes room.
TEST_F(WorkerTest, AStreamMayCarryAnyNumberOfBytes) {
  Start(1);
  PipelineDriver driver = MakeDriver();
  ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  const std::vector<uint32_t> rows(64, 7);
  int64_t bytes = 0;
  for (uint64_t position = 0; bytes < int64_t{40} << 20; position += rows.size()) {
    const absl::StatusOr<DrivenStep> step = driver.Feed(0, 1, position, rows);
    ASSERT_THAT(step, IsOk()) << "after " << bytes << " bytes";
    bytes += static_cast<int64_t>(step->logits.at(1).size());
  }
}

TEST_F(WorkerTest, AnEndedStreamEndsTheEpochEverywhereAndTheNextStandsAtOnce) {
  Start(3);
  for (int broken = 0; broken < 3; ++broken) {
    SCOPED_TRACE(broken);
    PipelineDriver driver = MakeDriver();
    ASSERT_THAT(driver.Open("router-0", absl::StrCat("e", broken)), IsOk());
    ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
    ASSERT_THAT(driver.Feed(0, 1, 0, tokens_), IsOk());
    driver.stream(broken).Cancel();
    // The break travels along the links: downstream at once, upstream with the next step.
    v1::Step step;
    *step.add_entries() = Entry(0, 1, tokens_.size(), {1});
    (void)driver.WriteStep(step);
    for (int stage = 0; stage < 3; ++stage) {
      if (stage < broken) continue;  // Told by the router, as below.
      absl::StatusOr<v1::ExecuteResponse> response = driver.stream(stage).Read();
      while (response.ok()) response = driver.stream(stage).Read();
      EXPECT_THAT(response.status().code(),
                  ::testing::AnyOf(absl::StatusCode::kUnavailable, absl::StatusCode::kCancelled))
          << stage << ": " << response.status();
    }
    driver.Close();
    ASSERT_THAT(driver.Open("router-0", absl::StrCat("again", broken)), IsOk());
    // Slots of the epoch before are gone.
    const absl::StatusOr<DrivenStep> stale = driver.Feed(0, 1, tokens_.size(), {1});
    EXPECT_THAT(stale.status(), StatusIs(absl::StatusCode::kAborted, HasSubstr("slot 0 holds nothing")));
    ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
    ASSERT_THAT(driver.Feed(0, 1, 0, tokens_), IsOk());
  }
}

TEST_F(WorkerTest, AWorkerThatDiesEndsTheEpochAndItsSuccessorServesTheNext) {
  Start(2);
  PipelineDriver driver = MakeDriver();
  ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
  ASSERT_THAT(driver.AttachFresh(0, 1), IsOk());
  workers_[1].reset();
  EXPECT_THAT(driver.stream(1).Read().status(), StatusIs(absl::StatusCode::kUnavailable));
  (void)driver.Feed(0, 1, 0, tokens_);
  EXPECT_THAT(driver.stream(0).Read().status(), StatusIs(absl::StatusCode::kUnavailable));
  absl::StatusOr<std::unique_ptr<Worker>> successor = Worker::Start(OptionsOf(1, 2));
  ASSERT_THAT(successor, IsOk());
  workers_[1] = *std::move(successor);
  PipelineDriver next = MakeDriver();
  ASSERT_THAT(next.Open("router-0", "e2"), IsOk());
  ASSERT_THAT(next.AttachFresh(0, 1), IsOk());
  EXPECT_THAT(next.Feed(0, 1, 0, tokens_), IsOk());
}

TEST_F(WorkerTest, OneRouterDrivesAndTheSameOneTakesOver) {
  Start(2);
  PipelineDriver first = MakeDriver(), second = MakeDriver(), again = MakeDriver();
  ASSERT_THAT(first.Open("router-0", "e1"), IsOk());
  EXPECT_THAT(second.Open("router-1", "e2"), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("router-0")));
  ASSERT_THAT(first.AttachFresh(0, 1), IsOk());
  ASSERT_THAT(again.Open("router-0", "e3"), IsOk());
  EXPECT_THAT(first.stream(0).Read().status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("took over")));
  ASSERT_THAT(again.AttachFresh(0, 1), IsOk());
  EXPECT_THAT(again.Feed(0, 1, 0, tokens_), IsOk());
  again.Close();
  first.Close();
  // The way is free as soon as the workers have seen the end.
  absl::Status status;
  int tries = 0;
  const auto opened = [&] {
    status = second.Open("router-1", absl::StrCat("f", ++tries));
    return status.ok();
  };
  EXPECT_TRUE(rwkv::testing::WaitUntil(opened)) << status;
}

TEST_F(WorkerTest, AStagePlanThatDoesNotFitIsRefused) {
  Start(2);
  struct Row {
    const char* name;
    int worker, index, count;
    const char* next;
  };
  for (const Row& row :
       {Row{"swapped", 0, 1, 2, ""}, Row{"alone", 0, 0, 1, ""}, Row{"negative", 0, -1, 2, "x:1"},
        Row{"beyond", 1, 2, 2, ""}, Row{"no next", 0, 0, 2, ""}, Row{"next of the last", 1, 1, 2, "x:1"}}) {
    SCOPED_TRACE(row.name);
    const auto stream = Connect(*workers_[row.worker])->Execute();
    v1::ExecuteRequest request;
    request.mutable_open()->set_router("router-0");
    request.mutable_open()->set_epoch("e1");
    request.mutable_open()->set_stage_index(row.index);
    request.mutable_open()->set_stage_count(row.count);
    request.mutable_open()->set_next_address(row.next);
    (void)stream->Write(request);
    EXPECT_THAT(stream->Read().status(), StatusIs(absl::StatusCode::kFailedPrecondition));
  }
}

TEST_F(WorkerTest, AStreamThatDoesNotBeginWithOpenIsRefused) {
  Start(1);
  const auto stream = Connect(*workers_[0])->Execute();
  v1::ExecuteRequest request;
  request.mutable_release()->set_slot(1);
  (void)stream->Write(request);
  EXPECT_THAT(stream->Read().status(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("open")));
}

TEST_F(WorkerTest, AMissingNextStageEndsTheEpoch) {
  Start(2);
  const auto stream = Connect(*workers_[0])->Execute();
  v1::ExecuteRequest request;
  request.mutable_open()->set_router("router-0");
  request.mutable_open()->set_epoch("e1");
  request.mutable_open()->set_stage_count(2);
  request.mutable_open()->set_next_address("127.0.0.1:1");
  ASSERT_THAT(stream->Write(request), IsOk());
  EXPECT_THAT(stream->Read().status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("link to 127.0.0.1:1")));
}

TEST_F(WorkerTest, AStepOutOfOrderEndsTheEpoch) {
  Start(1);
  PipelineDriver driver = MakeDriver();
  ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
  v1::ExecuteRequest request;
  request.mutable_step()->set_step_id(5);
  (void)driver.WriteAll(request);
  EXPECT_THAT(driver.stream(0).Read().status(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("step 5")));
}

// A peer that sends frames of a wrong epoch, order or size does no harm beyond the epoch.
TEST_F(WorkerTest, ABadFrameEndsTheEpoch) {
  Start(2);
  const Worker& worker = *workers_[1];
  const LinkShape shape = {32, 32, 64};
  struct Row {
    const char* name;
    void (*spoil)(v1::TransferRequest&);
  };
  const Row rows[] = {
      {"epoch", [](v1::TransferRequest& frame) { frame.set_epoch("other"); }},
      {"order", [](v1::TransferRequest& frame) { frame.set_step_id(2); }},
      {"rows", [](v1::TransferRequest& frame) { frame.set_rows(2); }},
      {"negative rows", [](v1::TransferRequest& frame) { frame.set_rows(-1); }},
      {"width", [](v1::TransferRequest& frame) { frame.set_width(31); }},
      {"bytes", [](v1::TransferRequest& frame) { frame.mutable_hidden()->pop_back(); }},
      {"v_first", [](v1::TransferRequest& frame) { frame.clear_v_first(); }},
      {"refusals", [](v1::TransferRequest& frame) { frame.add_refused_entries(0); }},
      {"refused entry beyond the step",
       [](v1::TransferRequest& frame) {
         frame.add_refused_entries(9);
         frame.add_refusals()->set_code(3);
       }},
  };
  int epoch_number = 0;
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    const std::string epoch = absl::StrCat("bad", epoch_number++);
    const auto stream = Connect(worker)->Execute();
    v1::ExecuteRequest request;
    request.mutable_open()->set_router("router-0");
    request.mutable_open()->set_epoch(epoch);
    request.mutable_open()->set_stage_index(1);
    request.mutable_open()->set_stage_count(2);
    ASSERT_THAT(stream->Write(request), IsOk());
    ASSERT_THAT(stream->Read(), IsOk());
    v1::ExecuteRequest attach;
    attach.mutable_attach()->set_sequence(1);
    attach.mutable_attach()->set_fresh(true);
    ASSERT_THAT(stream->Write(attach), IsOk());
    ASSERT_THAT(stream->Read(), IsOk());

    const auto stub = v1::Link::NewStub(common::MakeChannel(worker.address()));
    grpc::ClientContext context;
    const auto writer = stub->Transfer(&context);
    v1::TransferRequest hello;
    hello.set_epoch(epoch);
    hello.set_width(static_cast<int>(shape.width));
    ASSERT_TRUE(writer->Write(hello));
    v1::TransferRequest frame;
    frame.set_epoch(epoch);
    frame.set_step_id(1);
    frame.set_rows(1);
    frame.set_width(static_cast<int>(shape.width));
    frame.set_hidden(std::string(shape.width * 4, '\0'));
    frame.set_v_first(std::string(shape.v_first_width * 4, '\0'));
    row.spoil(frame);
    (void)writer->Write(frame);
    v1::ExecuteRequest step;
    step.mutable_step()->set_step_id(1);
    *step.mutable_step()->add_entries() = Entry(0, 1, 0, {1}, false);
    (void)stream->Write(step);
    EXPECT_THAT(stream->Read().status(), StatusIs(absl::StatusCode::kInvalidArgument));
    context.TryCancel();
    (void)writer->Finish();
  }
}

}  // namespace
}  // namespace rwkv::worker
