// Sessions.Import over gRPC: what it takes, and what it refuses.
#include "services/router/rpc/import_call.h"

#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/router/rpc/import_call_fixture.h"
#include "services/router/testing/fake_cluster.h"
#include "services/router/testing/turn_testing.h"
#include "services/state_store/client/crc32c.h"
#include "services/worker/client/fake_worker.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using checkpoint::ElementType;
using ::rwkv::testing::IsOk;
using ::rwkv::testing::RawTensor;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using worker::FakeModel;
using worker::FakePipeline;

TEST_F(ImportCallTest, ATunedStateIsABeginning) {
  StartServer();
  const uint64_t state = FakeModel::Feed(FakeModel::Fresh(), kPrompt);
  const auto tuned = [&](float first) {
    std::vector<RawTensor> tensors;
    for (int layer = 0; layer < kLayers; ++layer) {
      std::string bytes(reinterpret_cast<const char*>(&state), sizeof(state));
      if (first != 0) std::memcpy(bytes.data(), &first, sizeof(first));
      tensors.push_back(
          {{absl::StrCat("blocks.", layer, ".att.time_state"), ElementType::kFloat32, {2}}, std::move(bytes)});
    }
    return testing::TorchZipBytes(tensors);
  };
  ASSERT_OK_AND_ASSIGN(const v1::Session session, Import("", tuned(0)));
  EXPECT_THAT(session.id(), ::testing::StartsWith("s-"));
  EXPECT_TRUE(session.has_base_position());
  EXPECT_EQ(session.base_position(), 0);
  EXPECT_EQ(session.token_count(), 0);
  const std::vector<uint32_t> expected = FakeModel::Greedy(Concat(kPrompt, {9}), 5, vocabulary_);
  EXPECT_THAT(Generate(SessionRequest(session.id(), "r", {9}, 5)).tokens, ElementsAreArray(expected));
  ASSERT_OK(Fork(session.id(), 0, "fork"));
  EXPECT_THAT(Generate(SessionRequest("fork", "r", {9}, 5)).tokens, ElementsAreArray(expected));
  EXPECT_THAT(Import("t", tuned(std::numeric_limits<float>::infinity())),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("element 0 of blocks.0.att.time_state is inf")));
}

TEST_F(ImportCallTest, WhatIsRefusedLeavesNothingBehind) {
  StartServer();
  MakeSession("s");
  const File good = Exported("s", true);
  const struct {
    const char* name;
    std::function<std::string(File)> bytes;
    absl::StatusCode code;
    const char* message;
  } kCases[] = {
      {"another model",
       [](File file) {
         file.metadata["model_fingerprint"] = "ffff";
         return file.Bytes();
       },
       absl::StatusCode::kFailedPrecondition, "fingerprint \"ffff\""},
      {"another shape",
       [](File file) {
         file.tensors[0].spec.shape = {1, 2};
         return file.Bytes();
       },
       absl::StatusCode::kFailedPrecondition, "has shape [1, 2]; the model's states have [2]"},
      {"a layer missing",
       [](File file) {
         file.tensors.erase(file.tensors.begin() + 2);
         return file.Bytes();
       },
       absl::StatusCode::kInvalidArgument, "no tensor blocks.2.att.state"},
      {"not finite",
       [](File file) {
         const float nan = std::numeric_limits<float>::quiet_NaN();
         std::memcpy(&file.tensors[3].data[4], &nan, sizeof(nan));
         return file.Bytes();
       },
       absl::StatusCode::kInvalidArgument, "element 1 of blocks.3.att.state"},
      {"unknown tokens",
       [](File file) {
         file.tensors.back().data = BytesOf(std::vector<int32_t>(10, 1000));
         return file.Bytes();
       },
       absl::StatusCode::kInvalidArgument, "ids below 1000"},
      {"cut", [](File file) { return file.Bytes().substr(0, file.Bytes().size() - 1); }, absl::StatusCode::kDataLoss,
       "no state file"},
      {"text", [](File) { return std::string("It was a dark and stormy night."); }, absl::StatusCode::kInvalidArgument,
       "no state file"},
      {"empty", [](File) { return std::string(); }, absl::StatusCode::kInvalidArgument, "empty"},
      {"too large", [](File file) { return file.Bytes() + std::string(3 << 20, '\0'); },
       absl::StatusCode::kResourceExhausted, "no state of this model is larger"},
  };
  for (const auto& test : kCases) {
    SCOPED_TRACE(test.name);
    absl::Status status;  // What was refused before is in work for a moment after its answer.
    ASSERT_TRUE(WaitUntil([&] {
      status = Import("t", test.bytes(good)).status();
      return !absl::StrContains(status.message(), "are in work");
    }));
    EXPECT_THAT(status, StatusIs(test.code, HasSubstr(test.message)));
    EXPECT_THAT(SessionIds(), ElementsAre("s"));
  }
  EXPECT_THAT(Import("not allowed", good.Bytes()), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(Import("s", good.Bytes()), StatusIs(absl::StatusCode::kAlreadyExists));

  v1::SessionsImportRequest piece;
  piece.set_session_id("t");
  piece.set_data(good.Bytes());
  piece.set_crc32c(state_store::Crc32c(good.Bytes()) ^ 1);
  Upload upload = Begin();
  upload.writer->Write(piece);
  upload.writer->WritesDone();
  EXPECT_THAT(upload.End(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("crc32c")));
  upload = Begin();
  piece.set_data(std::string((1 << 20) + 1, 'x'));
  upload.writer->Write(piece);
  EXPECT_THAT(upload.End(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at most 1048576")));
  // All records are there, and the session cannot be made.
  WaitUntilLetGo("s");
  const int64_t stored = cluster_->store().record_bytes();
  for (const absl::Status& full : {absl::ResourceExhaustedError("the disk is full"), absl::UnavailableError("away")}) {
    cluster_->store().FailImportsWith(full);
    EXPECT_THAT(Import("t", good.Bytes()), StatusIs(full.code()));
    EXPECT_THAT(SessionIds(), ElementsAre("s"));
    EXPECT_EQ(cluster_->store().record_bytes(), stored);
  }
  cluster_->store().FailImportsWith(absl::OkStatus());
  cluster_->store().FailWith(absl::ResourceExhaustedError("the disk is full"));
  EXPECT_THAT(Import("t", good.Bytes()), StatusIs(absl::StatusCode::kResourceExhausted));
  cluster_->store().FailWith(absl::OkStatus());
  EXPECT_THAT(SessionIds(), ElementsAre("s"));
  EXPECT_OK(Import("t", good.Bytes()));
}

TEST_F(ImportCallTest, AnAnswerThatIsLostLeavesAWholeSessionOrNone) {
  StartServer();
  const std::vector<uint32_t> log = MakeSession("s");
  const std::string bytes = Exported("s", false).Bytes();
  cluster_->store().LoseImportAnswersWith(absl::UnavailableError("gone"));
  EXPECT_THAT(Import("t", bytes), StatusIs(absl::StatusCode::kUnavailable));
  cluster_->store().LoseImportAnswersWith(absl::OkStatus());
  EXPECT_THAT(SessionIds(), ElementsAre("s", "t"));
  EXPECT_THAT(Generate(SessionRequest("t", "r", {9}, 5)).tokens,
              ElementsAreArray(FakeModel::Greedy(Concat(log, {9}), 5, vocabulary_)));
}

TEST_F(ImportCallTest, AModelsContextBoundsWhatAStateHasSeen) {
  FakePipeline::Options pipeline;
  pipeline.max_context_tokens = 30;
  StartServer(pipeline);
  MakeSession("s");
  File file = Exported("s", false);
  file.metadata["position"] = "30";
  EXPECT_THAT(Import("t", file.Bytes()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("has seen 30 tokens; the model takes 30")));
  file.metadata["position"] = "29";
  EXPECT_OK(Import("t", file.Bytes()));
  EXPECT_THAT(Generate(SessionRequest("t", "r", {9}, 5)).status, StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST_F(ImportCallTest, WhoBeginsAndFallsSilentTakesNothingAndIsSentAway) {
  upload_limits_ = {absl::Milliseconds(200), kTestLimit};
  StartServer();
  MakeSession("s");
  std::vector<Upload> silent(3 * SessionsService::kMaxImports);
  for (Upload& upload : silent) upload = Begin();
  EXPECT_OK(Import("t", Exported("s", true).Bytes()));
  for (Upload& upload : silent) {
    EXPECT_THAT(upload.End(), StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("no piece of the state came")));
  }
  EXPECT_THAT(SessionIds(), ElementsAre("s", "t"));
}

}  // namespace
}  // namespace rwkv::router
