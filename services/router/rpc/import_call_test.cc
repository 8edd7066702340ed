// Sessions.Import over gRPC: what a session that came from a file goes on with, and what is refused.
#include "services/router/rpc/import_call.h"

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/sessions.pb.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/common/grpc_status.h"
#include "services/router/rpc/services_fixture.h"
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
using ::rwkv::testing::SafetensorsBytes;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using worker::FakeModel;
using worker::FakePipeline;

constexpr char kFingerprint[] = "00000000000000000000000000000fab";  // FakePipeline's.
constexpr int kLayers = 4;

template <typename T>
std::string BytesOf(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

struct File {
  std::vector<RawTensor> tensors;
  std::map<std::string, std::string> metadata;

  std::string Bytes() const { return SafetensorsBytes(tensors, metadata); }
};

class ImportCallTest : public ServicesTest {
 protected:
  struct Upload {
    std::unique_ptr<grpc::ClientContext> context = std::make_unique<grpc::ClientContext>();
    std::unique_ptr<v1::SessionsImportResponse> response = std::make_unique<v1::SessionsImportResponse>();
    std::unique_ptr<grpc::ClientWriter<v1::SessionsImportRequest>> writer;
    absl::Status End() { return common::FromGrpcStatus(writer->Finish()); }
  };
  Upload Begin() {
    Upload upload;
    SetLimit(*upload.context);
    upload.writer = sessions_->Import(upload.context.get(), upload.response.get());
    return upload;
  }

  // In pieces, with the checksum in the last one.
  absl::StatusOr<v1::Session> Import(const std::string& id, const std::string& bytes, size_t piece_bytes = 1 << 20) {
    Upload upload = Begin();
    v1::SessionsImportRequest piece;
    piece.set_session_id(id);
    for (size_t begin = 0; begin < bytes.size(); begin += piece_bytes) {
      piece.set_data(bytes.substr(begin, piece_bytes));
      if (begin + piece_bytes >= bytes.size()) piece.set_crc32c(state_store::Crc32c(bytes));
      if (!upload.writer->Write(piece)) return upload.End();
      piece.Clear();
    }
    upload.writer->WritesDone();
    const absl::Status end = upload.End();
    if (!end.ok()) return end;
    return upload.response->session();
  }

  // What `rwkvctl sessions export` makes of a session.
  File Exported(const std::string& id, bool with_log) {
    std::map<std::string, Tensor> tensors;
    EXPECT_THAT(Export(id, &tensors), IsOk());
    File file;
    for (const auto& [name, tensor] : tensors) {
      file.tensors.push_back({{name, ElementType::kFloat32, tensor.shape}, tensor.bytes});
      file.metadata["position"] = absl::StrCat(tensor.position);
    }
    file.metadata["model_fingerprint"] = kFingerprint;
    file.metadata["initial_state"] = GetSession(*cluster_, id).initial_state();
    if (with_log) {
      const std::vector<uint32_t> log = cluster_->Log(id);
      file.tensors.push_back({{"token_ids", ElementType::kInt32, {static_cast<int64_t>(log.size())}}, BytesOf(log)});
    }
    return file;
  }

  // A session of kPrompt and six tokens; returns its log.
  std::vector<uint32_t> MakeSession(const std::string& id) {
    CreateSession(id);
    EXPECT_THAT(Generate(SessionRequest(id, "r", kPrompt, 6)).status, IsOk());
    return cluster_->Log(id);
  }

  // The router gives a session's lease back when none of its snapshots is on its way.
  void WaitUntilLetGo(const std::string& id) {
    v1::AcquireLeaseRequest acquire;
    acquire.set_session_id(id);
    acquire.set_holder("the test");
    acquire.set_incarnation("1");
    acquire.mutable_ttl()->set_seconds(60);
    EXPECT_TRUE(WaitUntil([&] { return cluster_->store().AcquireLease(acquire, absl::Now() + kTestLimit).ok(); }));
  }

  std::vector<std::string> SessionIds() {
    v1::SessionsListResponse page;
    EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::List, {}, &page), IsOk());
    std::vector<std::string> ids;
    for (const v1::Session& session : page.sessions()) ids.push_back(session.id());
    return ids;
  }

  absl::StatusOr<v1::Session> Fork(const std::string& id, uint64_t position, const std::string& new_id) {
    v1::SessionsForkRequest fork;
    fork.set_session_id(id);
    fork.set_position(position);
    fork.set_new_session_id(new_id);
    v1::SessionsForkResponse forked;
    const absl::Status status = Call(*sessions_, &v1::Sessions::Stub::Fork, fork, &forked);
    if (!status.ok()) return status;
    return forked.session();
  }
};

// Without input: goes on from what the session has.
v1::GenerateRequest Continuation(const std::string& session_id, const std::string& request_id, uint32_t count) {
  v1::GenerateRequest request = SessionRequest(session_id, request_id, {}, count);
  request.clear_input();
  return request;
}

v1::GenerateRequest Sampled(v1::GenerateRequest request) {
  request.mutable_sampling()->set_temperature(1);
  request.mutable_sampling()->set_seed(42);
  return request;
}

// With its log or without, cut into small pieces or sent at once: the tokens are those of the session that stayed.
TEST_F(ImportCallTest, AnImportGoesOnAsTheSessionThatItCameFrom) {
  StartServer();
  MakeSession("s");
  for (const bool with_log : {true, false}) {
    SCOPED_TRACE(with_log);
    const std::string bytes = Exported("s", with_log).Bytes();
    for (const bool sampled : {false, true}) {
      const std::string id = absl::StrCat("t", with_log, sampled);
      ASSERT_OK_AND_ASSIGN(const v1::Session session, Import(id, bytes, sampled ? 7 : 1 << 20));
      EXPECT_EQ(session.id(), id);
      EXPECT_EQ(session.token_count(), 10);
      EXPECT_EQ(session.model_fingerprint(), kFingerprint);
      EXPECT_EQ(session.has_base_position(), !with_log);
      EXPECT_EQ(session.log_begin(), with_log ? 0 : 10);
      EXPECT_THAT(session.snapshot_positions(), ElementsAre(10));
      const std::string twin = absl::StrCat("twin", id);
      ASSERT_OK(Fork("s", 10, twin));
      const auto turn = [&](const std::string& of) {
        v1::GenerateRequest request = SessionRequest(of, "r2", {9, 3}, 12);
        return sampled ? Sampled(request) : request;
      };
      const Result expected = Generate(turn(twin));
      const Result result = Generate(turn(id));
      ASSERT_THAT(result.status, IsOk());
      EXPECT_EQ(result.tokens, expected.tokens);
      EXPECT_EQ(result.finish.reused_tokens(), 10);
      EXPECT_EQ(result.finish.session_tokens(), 24);
    }
  }
}

TEST_F(ImportCallTest, WithItsLogItCanBeRewoundForkedAndRebuilt) {
  StartServer();
  const std::vector<uint32_t> log = MakeSession("s");
  ASSERT_OK(Import("t", Exported("s", true).Bytes()));
  EXPECT_EQ(cluster_->Log("t"), log);
  ASSERT_OK(Fork("t", 6, "u"));
  std::vector<uint32_t> shorter(log.begin(), log.begin() + 6);
  shorter.push_back(9);
  EXPECT_THAT(Generate(SessionRequest("u", "r", {9}, 5)).tokens,
              ElementsAreArray(FakeModel::Greedy(shorter, 5, vocabulary_)));
  // A turn without input goes on from the last token, which the imported state has seen.
  EXPECT_THAT(Generate(Continuation("t", "r", 5)).tokens, ElementsAreArray(FakeModel::Greedy(log, 5, vocabulary_)));
  // The snapshot is a cache.
  ASSERT_OK(Import("v", Exported("s", true).Bytes()));
  cluster_->store().FailGetRecords(2, absl::DataLossError("corrupt"));
  std::vector<uint32_t> longer = Concat(log, {9});
  EXPECT_THAT(Generate(SessionRequest("v", "r", {9}, 5)).tokens,
              ElementsAreArray(FakeModel::Greedy(longer, 5, vocabulary_)));
}

TEST_F(ImportCallTest, WithoutItsLogNothingGoesBackToBeforeIt) {
  StartServer(World());
  const std::vector<uint32_t> log = MakeSession("s");
  ASSERT_OK(Import("t", Exported("s", false).Bytes()));
  EXPECT_THAT(Fork("t", 9, "u"), StatusIs(absl::StatusCode::kOutOfRange, HasSubstr("imported state at position 10")));
  v1::SessionsRewindRequest rewind;
  rewind.set_session_id("t");
  rewind.set_position(9);
  v1::SessionsRewindResponse rewound;
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Rewind, rewind, &rewound),
              StatusIs(absl::StatusCode::kOutOfRange, HasSubstr("cannot be rewound to 9")));
  v1::SessionsGetRequest get;
  get.set_session_id("t");
  get.set_tokens_count(100);
  v1::SessionsGetResponse got;
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Get, get, &got),
              StatusIs(absl::StatusCode::kOutOfRange, HasSubstr("imported without its first 10 tokens")));
  EXPECT_THAT(Generate(Continuation("t", "r", 5)).status,
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no tokens to go on from after the imported")));
  v1::GenerateRequest named = SessionRequest("t", "r", {9}, 5);
  named.set_initial_state("poet");
  EXPECT_FALSE(Generate(named).status.ok());

  // The first turn, one that goes on from it, and both again after a rewind to where it began.
  const std::vector<uint32_t> first = FakeModel::Greedy(Concat(log, {9}), 5, vocabulary_);
  const std::vector<uint32_t> second = FakeModel::Greedy(Concat(Concat(log, {9}), first), 5, vocabulary_);
  for (const char* request : {"a", "b"}) {
    EXPECT_THAT(Generate(SessionRequest("t", request, {9}, 5)).tokens, ElementsAreArray(first));
    EXPECT_THAT(Generate(Continuation("t", absl::StrCat(request, 2), 5)).tokens, ElementsAreArray(second));
    get.set_tokens_begin(10);
    ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Get, get, &got), IsOk());
    EXPECT_EQ(got.token_ids_size(), 11);
    rewind.set_position(10);
    ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Rewind, rewind, &rewound), IsOk());
    EXPECT_EQ(rewound.session().token_count(), 10);
  }
  // Of the log that is there, the penalties count all.
  v1::GenerateRequest counting = Sampled(SessionRequest("t", "c", {9}, 5));
  counting.mutable_sampling()->set_frequency_penalty(1);
  counting.mutable_sampling()->set_penalize_prompt(true);
  EXPECT_THAT(Generate(counting).status, IsOk());

  // Forks live on without it, and can be exported themselves.
  ASSERT_OK_AND_ASSIGN(const v1::Session fork, Fork("t", 10, "fork"));
  EXPECT_EQ(fork.base_position(), 10);
  v1::SessionsDeleteRequest erase;
  erase.set_session_id("t");
  v1::SessionsDeleteResponse erased;
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Delete, erase, &erased), IsOk());
  std::map<std::string, Tensor> tensors;
  ASSERT_THAT(Export("fork", &tensors), IsOk());
  EXPECT_EQ(tensors.begin()->second.position, 10);
  EXPECT_THAT(Generate(SessionRequest("fork", "r", {9}, 5)).tokens, ElementsAreArray(first));
}

TEST_F(ImportCallTest, TheBaseIsKnownWhileTheLeaseIsHeld) {
  StartServer(Tuned());
  MakeSession("s");
  ASSERT_OK(Import("t", Exported("s", false).Bytes()));
  cluster_->pipeline().HoldSaves(true);  // And with them the lease.
  ASSERT_THAT(Generate(SessionRequest("t", "a", {9}, 5)).status, IsOk());
  v1::GenerateRequest named = SessionRequest("t", "b", {9}, 5);
  named.set_initial_state(kPoet);
  EXPECT_THAT(Generate(named).status,
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("began with an imported state")));
  v1::GenerateRequest counting = Sampled(SessionRequest("t", "c", {9}, 5));
  counting.mutable_sampling()->set_frequency_penalty(1);
  counting.mutable_sampling()->set_penalize_prompt(true);
  // What is held up behind the save is let go when the turn has begun.
  std::atomic<bool> ended{false};
  absl::Status status;
  std::thread client([&] {
    status = Generate(counting).status;
    ended = true;
  });
  EXPECT_TRUE(WaitUntil([&] { return ended || GetSession(*cluster_, "t").token_count() == 17; }));
  cluster_->pipeline().HoldSaves(false);
  client.join();
  EXPECT_THAT(status, IsOk());
}

TEST_F(ImportCallTest, ItGoesOnOverLostEpochsAndLostSnapshotsFromItsBase) {
  TurnManager::Options options;
  options.snapshot_interval_tokens = 4;
  options.retry_delay = absl::Milliseconds(1);
  StartServer({}, options);
  const std::vector<uint32_t> log = MakeSession("s");
  ASSERT_OK(Import("t", Exported("s", false).Bytes()));
  const std::vector<uint32_t> first = FakeModel::Greedy(Concat(log, {9}), 20, vocabulary_);
  EXPECT_THAT(Generate(SessionRequest("t", "a", {9}, 20)).tokens, ElementsAreArray(first));
  ASSERT_TRUE(WaitUntil([&] { return GetSession(*cluster_, "t").snapshot_positions_size() > 2; }));
  Reconnect(*cluster_);
  // All but the base cannot be read: one after the other is dropped.
  cluster_->store().FailGetRecords(2, absl::DataLossError("corrupt"));
  const std::vector<uint32_t> known = Concat(Concat(Concat(log, {9}), first), {7});
  EXPECT_THAT(Generate(SessionRequest("t", "b", {7}, 5)).tokens,
              ElementsAreArray(FakeModel::Greedy(known, 5, vocabulary_)));
  Reconnect(*cluster_);
  // So often unavailable that snapshots are left alone: not the base.
  const std::vector<uint32_t> longer = Concat(Concat(known, FakeModel::Greedy(known, 5, vocabulary_)), {8});
  cluster_->store().FailGetRecords(22, absl::UnavailableError("away"));  // One a stage and attempt.
  const Result restarted = Generate(SessionRequest("t", "c", {8}, 5));
  EXPECT_THAT(restarted.tokens, ElementsAreArray(FakeModel::Greedy(longer, 5, vocabulary_)));
  EXPECT_EQ(restarted.finish.reused_tokens(), 10);
}

TEST_F(ImportCallTest, ALostBaseIsSaidAndNothingElseIsMadeOfIt) {
  StartServer();
  MakeSession("s");
  File file = Exported("s", false);
  ASSERT_OK(Import("t", file.Bytes()));
  file.metadata["position"] = "0";
  ASSERT_OK(Import("u", file.Bytes()));
  for (const absl::Status& lost : {absl::DataLossError("corrupt"), absl::NotFoundError("no such record")}) {
    for (const std::string id : {"t", "u"}) {
      cluster_->store().FailGetRecords(1000, lost);
      EXPECT_THAT(Generate(SessionRequest(id, "r", {9}, 5)).status,
                  StatusIs(absl::StatusCode::kDataLoss,
                           HasSubstr(absl::StrCat("session \"", id, "\" was imported with a state at position ",
                                                  id == "t" ? 10 : 0,
                                                  ", which cannot be read any more: ", std::string(lost.message())))));
      std::map<std::string, Tensor> tensors;
      EXPECT_THAT(Export(id, &tensors), StatusIs(absl::StatusCode::kDataLoss));
    }
  }
  // It was not dropped for that: once the disk is back, so is the session.
  cluster_->store().FailGetRecords(0, absl::OkStatus());
  EXPECT_THAT(Generate(SessionRequest("t", "r", {9}, 5)).status, IsOk());
  EXPECT_THAT(Generate(SessionRequest("u", "r", {9}, 5)).status, IsOk());
}

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

TEST_F(ImportCallTest, ALogThatCannotBeFedAgainIsKeptAndNotTrusted) {
  FakePipeline::Options pipeline;
  pipeline.initial_states = {kPoet};
  StartServer(pipeline);
  v1::SessionsCreateRequest create;
  create.set_session_id("s");
  create.set_initial_state(kPoet);
  v1::SessionsCreateResponse created;
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Create, create, &created), IsOk());
  ASSERT_THAT(Generate(SessionRequest("s", "r", kPrompt, 6)).status, IsOk());
  const std::vector<uint32_t> log = cluster_->Log("s");
  const std::string bytes = Exported("s", true).Bytes();
  ASSERT_OK_AND_ASSIGN(const v1::Session here, Import("here", bytes));
  EXPECT_EQ(here.initial_state(), kPoet);
  EXPECT_FALSE(here.has_base_position());

  cluster_->pipeline().SetInitialStates({});
  Reconnect(*cluster_);
  ASSERT_OK_AND_ASSIGN(const v1::Session there, Import("there", bytes));
  EXPECT_EQ(there.initial_state(), "");
  EXPECT_EQ(there.base_position(), 10);
  EXPECT_EQ(there.log_begin(), 0);
  EXPECT_EQ(cluster_->Log("there"), log);
  EXPECT_THAT(Fork("there", 9, "u"), StatusIs(absl::StatusCode::kOutOfRange));
  EXPECT_THAT(Generate(SessionRequest("there", "r", {9}, 5)).tokens,
              ElementsAreArray(FakeModel::Greedy(Concat(log, {9}), 5, vocabulary_, kPoet)));
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
