// What a session that came from a file goes on with, and what of the past it has.
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/router/rpc/import_call_fixture.h"
#include "services/router/testing/fake_cluster.h"
#include "services/router/testing/turn_testing.h"
#include "services/worker/client/fake_worker.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using worker::FakeModel;
using worker::FakePipeline;

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
  EXPECT_THAT(Generate(counting).status, IsOk());
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

}  // namespace
}  // namespace rwkv::router
