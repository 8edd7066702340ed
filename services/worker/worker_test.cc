// What a whole worker is and says of itself, and the options that it refuses.
#include "services/worker/worker.h"

#include <cmath>
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
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "rwkv/v1/worker.pb.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/worker/testing/pipeline_driver.h"
#include "services/worker/testing/test_engine.h"
#include "services/worker/worker_fixture.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;

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
      {"many slots", [](Worker::Options& o) { o.slots = 65537; }, absl::StatusCode::kInvalidArgument, "--slots: 65537"},
      {"rows", [](Worker::Options& o) { o.max_batch_tokens = 0; }, absl::StatusCode::kInvalidArgument,
       "--max_batch_tokens"},
      {"many rows", [](Worker::Options& o) { o.max_batch_tokens = 8193; }, absl::StatusCode::kInvalidArgument,
       "--max_batch_tokens: 8193"},
      {"epsilon", [](Worker::Options& o) { o.group_norm_epsilon = 0; }, absl::StatusCode::kInvalidArgument,
       "--group_norm_eps: 0 "},
      {"large epsilon", [](Worker::Options& o) { o.group_norm_epsilon = 1.5f; }, absl::StatusCode::kInvalidArgument,
       "--group_norm_eps: 1.5"},
      {"no epsilon", [](Worker::Options& o) { o.group_norm_epsilon = std::nanf(""); },
       absl::StatusCode::kInvalidArgument, "--group_norm_eps: nan"},
      {"no context", [](Worker::Options& o) { o.deep_embed_context = 0; }, absl::StatusCode::kInvalidArgument,
       "--deep_embed_context: 0"},
      {"large context", [](Worker::Options& o) { o.deep_embed_context = (1 << 20) + 1; },
       absl::StatusCode::kInvalidArgument, "--deep_embed_context: 1048577"},
      {"link", [](Worker::Options& o) { o.link = "rdma"; }, absl::StatusCode::kInvalidArgument, "--link: \"rdma\""},
      {"link without a GPU", [](Worker::Options& o) { o.link = "nccl"; }, absl::StatusCode::kFailedPrecondition,
       "--link=nccl: "},
      {"no link timeout", [](Worker::Options& o) { o.link_timeout = absl::ZeroDuration(); },
       absl::StatusCode::kInvalidArgument, "--link_timeout: 0"},
      {"long link timeout", [](Worker::Options& o) { o.link_timeout = absl::Minutes(30) + absl::Nanoseconds(1); },
       absl::StatusCode::kInvalidArgument, "--link_timeout: 30m"},
      {"kept states", [](Worker::Options& o) { o.kept_state_bytes = -1; }, absl::StatusCode::kInvalidArgument,
       "--kept_state_bytes"},
      {"snapshots", [](Worker::Options& o) { o.max_snapshot_bytes_in_flight = 0; }, absl::StatusCode::kInvalidArgument,
       "--max_snapshot_bytes_in_flight"},
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

TEST_F(WorkerTest, AnOptionAtItsLimitIsTaken) {
  Worker::Options options = OptionsOf(0, 1);
  options.slots = 1;
  options.max_batch_tokens = 8192;
  options.group_norm_epsilon = 1;
  options.deep_embed_context = 1 << 20;
  options.link_timeout = absl::Minutes(30);
  options.max_snapshot_bytes_in_flight = 1;
  EXPECT_THAT(Worker::Start(options), IsOk());
  options.max_batch_tokens = 1;
  options.deep_embed_context = 1;
  EXPECT_THAT(Worker::Start(options), IsOk());
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
