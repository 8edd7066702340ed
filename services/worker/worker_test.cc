// Whole workers over real gRPC: links, epochs, bad input.
#include "services/worker/worker.h"

#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/client_context.h"
#include "grpcpp/support/sync_stream.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "rwkv/v1/worker.grpc.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/common/channel.h"
#include "services/common/grpc_status.h"
#include "services/worker/client/worker_client.h"
#include "services/worker/testing/pipeline_driver.h"
#include "services/worker/testing/test_engine.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;

class WorkerTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    path_ = absl::StrCat(std::getenv("TEST_TMPDIR"), "/worker-test.safetensors");
    ASSERT_THAT(rwkv::testing::WriteRandomModel(ModelOptions(), path_), IsOk());
  }

  static rwkv::testing::RandomModelOptions ModelOptions() {
    rwkv::testing::RandomModelOptions options;
    options.layers = 5;
    options.width = 32;
    options.head_size = 16;
    options.vocab_size = 67;
    return options;
  }

  static Worker::Options OptionsOf(int stage, int stages) {
    Worker::Options options;
    options.name = absl::StrCat("worker-", stage);
    options.model = path_;
    options.stage = absl::StrCat(stage, "/", stages);
    options.slots = 40;
    options.max_batch_tokens = 64;
    return options;
  }

  void Start(int stages) {
    for (int stage = 0; stage < stages; ++stage) {
      absl::StatusOr<std::unique_ptr<Worker>> worker = Worker::Start(OptionsOf(stage, stages));
      ASSERT_THAT(worker, IsOk());
      workers_.push_back(*std::move(worker));
    }
  }

  static std::shared_ptr<WorkerClient> Connect(const Worker& worker) {
    return MakeWorkerClient(worker.address(), common::MakeChannel(worker.address()));
  }

  PipelineDriver MakeDriver() const {
    std::vector<std::shared_ptr<WorkerClient>> clients;
    for (const auto& worker : workers_) clients.push_back(Connect(*worker));
    return PipelineDriver(std::move(clients));
  }

  static std::string path_;
  std::vector<std::unique_ptr<Worker>> workers_;
  const std::vector<uint32_t> tokens_ = {1, 5, 66, 0, 7, 7, 31, 2, 40, 12, 3};
};

std::string WorkerTest::path_;

TEST_F(WorkerTest, OneTwoAndThreeStagesGiveTheSameBits) {
  EnginePipeline twin(path_, 1);
  ASSERT_THAT(twin.AttachFresh(0, 1), IsOk());
  const absl::StatusOr<StepOutput> expected = twin.Feed(0, 1, 0, tokens_);
  ASSERT_THAT(expected, IsOk());
  for (int stages : {1, 2, 3}) {
    SCOPED_TRACE(stages);
    workers_.clear();
    Start(stages);
    PipelineDriver driver = MakeDriver();
    ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
    ASSERT_THAT(driver.AttachFresh(7, 21), IsOk());
    const absl::StatusOr<DrivenStep> step = driver.Feed(7, 21, 0, tokens_);
    ASSERT_THAT(step, IsOk());
    EXPECT_EQ(step->logits.at(21), LogitsOf(*expected, 1));
    EXPECT_EQ(step->result.entries(0).position(), tokens_.size());
  }
}

TEST_F(WorkerTest, DescribeSaysWhatTheStageIs) {
  Start(2);
  const absl::StatusOr<v1::DescribeResponse> description =
      Connect(*workers_[1])->Describe(absl::Now() + absl::Seconds(10));
  ASSERT_THAT(description, IsOk());
  EXPECT_EQ(description->name(), "worker-1");
  EXPECT_EQ(description->first_layer(), 3);
  EXPECT_EQ(description->end_layer(), 5);
  EXPECT_EQ(description->model().layer_count(), 5);
  EXPECT_EQ(description->model().fingerprint().size(), 32u);
  EXPECT_EQ(description->slots(), 40);
  ASSERT_EQ(description->state_layout_size(), 3);
  EXPECT_EQ(description->state_layout(1).name(), "att.state");
  EXPECT_FALSE(description->draining());
}

// The fingerprint is over what the worker reads, so that equal ones mean equal weights.
TEST_F(WorkerTest, AnAdapterMakesTheModelThatMergingItMakes) {
  const std::vector<float> a(32, 0.5f);
  const std::vector<float> b(32, 0.25f);
  const auto bytes = [](const std::vector<float>& values) {
    return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
  };
  using checkpoint::ElementType;
  Worker::Options adapted = OptionsOf(0, 1);
  adapted.lora = absl::StrCat(path_, ".lora");
  adapted.lora_alpha = 2;
  ASSERT_THAT(rwkv::testing::WriteFileAtomically(
                  adapted.lora, rwkv::testing::SafetensorsBytes(std::vector<rwkv::testing::RawTensor>{
                                    {{"blocks.1.att.key.lora_A", ElementType::kFloat32, {1, 32}}, bytes(a)},
                                    {{"blocks.1.att.key.lora_B", ElementType::kFloat32, {32, 1}}, bytes(b)}})),
              IsOk());
  absl::StatusOr<std::vector<rwkv::testing::RawTensor>> tensors = rwkv::testing::MakeRandomModel(ModelOptions());
  ASSERT_THAT(tensors, IsOk());
  for (rwkv::testing::RawTensor& tensor : *tensors) {
    if (tensor.spec.name != "blocks.1.att.key.weight") continue;
    std::vector<float> weights(32 * 32);
    kernels::WidenToFloat(kernels::DType::kBFloat16, tensor.data.data(), 32 * 32, weights.data());
    for (float& weight : weights) weight += 0.25f;
    kernels::NarrowFromFloat(kernels::DType::kBFloat16, weights.data(), 32 * 32, &tensor.data[0]);
  }
  Worker::Options merged = OptionsOf(0, 1);
  merged.model = absl::StrCat(path_, ".merged");
  ASSERT_THAT(rwkv::testing::WriteFileAtomically(merged.model, rwkv::testing::SafetensorsBytes(*tensors)), IsOk());

  std::vector<std::string> fingerprints;
  for (const Worker::Options& options : {OptionsOf(0, 1), adapted, merged}) {
    const absl::StatusOr<std::unique_ptr<Worker>> worker = Worker::Start(options);
    ASSERT_THAT(worker, IsOk());
    fingerprints.push_back((*worker)->description().model().fingerprint());
  }
  EXPECT_EQ(fingerprints[1], fingerprints[2]);
  EXPECT_NE(fingerprints[1], fingerprints[0]);
}

TEST_F(WorkerTest, AnotherGroupNormIsAnotherModel) {
  const auto fingerprint = [](float epsilon) {
    Worker::Options options = OptionsOf(0, 1);
    options.group_norm_epsilon = epsilon;
    return Worker::Start(options).value()->description().model().fingerprint();
  };
  const std::string usual = fingerprint(64e-5f);
  const std::string small = fingerprint(1e-5f);
  EXPECT_NE(small, usual);
  EXPECT_EQ(small, fingerprint(1e-5f));
  EXPECT_NE(small, fingerprint(1e-4f));
  EXPECT_EQ(fingerprint(Worker::Options().group_norm_epsilon), usual);
}

TEST_F(WorkerTest, TunedStatesAreOfferedByIdAndMakeNoOtherModel) {
  using checkpoint::ElementType;
  std::vector<rwkv::testing::RawTensor> states;
  for (int layer = 0; layer < 5; ++layer) {
    const std::vector<float> values(2 * 16 * 16, 0.25f * static_cast<float>(layer + 1));
    states.push_back({{absl::StrCat("blocks.", layer, ".att.time_state"), ElementType::kFloat32, {2, 16, 16}},
                      std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float))});
  }
  const std::string file = absl::StrCat(path_, ".states");
  ASSERT_THAT(rwkv::testing::WriteFileAtomically(file, rwkv::testing::SafetensorsBytes(states)), IsOk());
  std::string logits[2];
  for (int stages : {1, 2}) {
    workers_.clear();
    for (int stage = 0; stage < stages; ++stage) {
      Worker::Options options = OptionsOf(stage, stages);
      options.initial_states = {absl::StrCat("poet=", file), absl::StrCat("bard=", file)};
      absl::StatusOr<std::unique_ptr<Worker>> worker = Worker::Start(options);
      ASSERT_THAT(worker, IsOk());
      workers_.push_back(*std::move(worker));
      EXPECT_THAT(workers_.back()->description().model().initial_states(),
                  ElementsAre(MatchesRegex("bard@[0-9a-f]{8}"), MatchesRegex("poet@[0-9a-f]{8}")));
    }
    PipelineDriver driver = MakeDriver();
    ASSERT_THAT(driver.Open("router-0", "e1"), IsOk());
    v1::AttachSequence attach;
    attach.set_slot(7);
    attach.set_sequence(21);
    attach.set_fresh(true);
    attach.set_initial_state(workers_[0]->description().model().initial_states(1));
    ASSERT_THAT(driver.Attach(attach), IsOk());
    const absl::StatusOr<DrivenStep> step = driver.Feed(7, 21, 0, tokens_);
    ASSERT_THAT(step, IsOk());
    logits[stages - 1] = step->logits.at(21);
    attach.set_initial_state("poet@00000000");
    EXPECT_THAT(driver.Attach(attach), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("bard@")));
  }
  EXPECT_EQ(logits[0], logits[1]);
  const std::string fingerprint = workers_[0]->description().model().fingerprint();
  workers_.clear();
  Start(1);
  EXPECT_EQ(workers_[0]->description().model().fingerprint(), fingerprint);
  EXPECT_EQ(workers_[0]->description().model().initial_states_size(), 0);
}

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
  absl::Status status = absl::UnavailableError("not tried");
  for (const absl::Time limit = absl::Now() + absl::Seconds(10); !status.ok() && absl::Now() < limit;) {
    status = second.Open("router-1", absl::StrCat("f", absl::ToUnixNanos(absl::Now())));
  }
  EXPECT_THAT(status, IsOk());
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

TEST_F(WorkerTest, AWrongOptionIsNamed) {
  struct Row {
    const char* name;
    void (*spoil)(Worker::Options&);
    absl::StatusCode code;
    const char* says;
  };
  const Row rows[] = {
      {"no model", [](Worker::Options& o) { o.model = ""; }, absl::StatusCode::kInvalidArgument, "--model"},
      {"missing file", [](Worker::Options& o) { o.model = "/no/such.pth"; }, absl::StatusCode::kNotFound,
       "/no/such.pth"},
      {"adapter without alpha", [](Worker::Options& o) { o.lora = "a.pth"; }, absl::StatusCode::kInvalidArgument,
       "--lora_alpha"},
      {"alpha without adapter", [](Worker::Options& o) { o.lora_alpha = 8; }, absl::StatusCode::kInvalidArgument,
       "--lora "},
      {"missing adapter", [](Worker::Options& o) { o.lora = "/no/such.pth", o.lora_alpha = 8; },
       absl::StatusCode::kNotFound, "/no/such.pth"},
      {"no state file", [](Worker::Options& o) { o.initial_states = {"poet"}; }, absl::StatusCode::kInvalidArgument,
       "--initial_states: \"poet\": not NAME=FILE"},
      {"missing state file", [](Worker::Options& o) { o.initial_states = {"poet=/no/such.pth"}; },
       absl::StatusCode::kNotFound, "--initial_states: \"poet=/no/such.pth\""},
      {"stage", [](Worker::Options& o) { o.stage = "2/2"; }, absl::StatusCode::kInvalidArgument, "2/2"},
      {"stages", [](Worker::Options& o) { o.stage = "0/9"; }, absl::StatusCode::kInvalidArgument, "0/9"},
      {"both", [](Worker::Options& o) { o.layers = "0:5"; }, absl::StatusCode::kInvalidArgument, "--layers"},
      {"layers", [](Worker::Options& o) { o.stage = "", o.layers = "3:6"; }, absl::StatusCode::kInvalidArgument, "3:6"},
      {"slots", [](Worker::Options& o) { o.slots = 0; }, absl::StatusCode::kInvalidArgument, "--slots"},
      {"rows", [](Worker::Options& o) { o.max_batch_tokens = -3; }, absl::StatusCode::kInvalidArgument,
       "--max_batch_tokens"},
      {"threads", [](Worker::Options& o) { o.threads = 1025; }, absl::StatusCode::kInvalidArgument, "--threads: 1025"},
      {"no_threads", [](Worker::Options& o) { o.threads = -1; }, absl::StatusCode::kInvalidArgument, "--threads: -1"},
      {"device", [](Worker::Options& o) { o.device = "gpu"; }, absl::StatusCode::kInvalidArgument, "--device: "},
      {"address", [](Worker::Options& o) { o.listen = "nowhere"; }, absl::StatusCode::kInvalidArgument, "nowhere"},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    Worker::Options options = OptionsOf(0, 2);
    row.spoil(options);
    EXPECT_THAT(Worker::Start(options).status(), StatusIs(row.code, HasSubstr(row.says)));
  }
}

TEST_F(WorkerTest, APortInUseIsNamed) {
  Start(1);
  Worker::Options options = OptionsOf(0, 1);
  options.listen = workers_[0]->address();
  EXPECT_THAT(Worker::Start(options).status(),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr(workers_[0]->address())));
}

}  // namespace
}  // namespace rwkv::worker
