#include "services/state_store/client/state_store_client.h"

#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/state_store.grpc.pb.h"
#include "services/common/grpc_status.h"
#include "services/state_store/client/fake_store_fixture.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::StatusIs;

constexpr char kModel[] = "0123456789abcdef0123456789abcdef";

// --- Against the real services --------------------------------------------------------------------------------------

class StateStoreClientTest : public FakeStoreTest {
 protected:
  v1::AcquireLeaseResponse Create(const std::string& session_id) {
    v1::CreateSessionRequest create;
    create.set_session_id(session_id);
    EXPECT_OK(fake_->CreateSession(create, Deadline()));
    v1::AcquireLeaseRequest acquire;
    acquire.set_session_id(session_id);
    acquire.set_holder("router-0");
    acquire.set_incarnation("1");
    acquire.mutable_ttl()->set_seconds(10);
    const auto grant = fake_->AcquireLease(acquire, Deadline());
    EXPECT_OK(grant);
    return grant.ok() ? *grant : v1::AcquireLeaseResponse();
  }

  absl::StatusOr<v1::BeginTurnResponse> Begin(const v1::Lease& lease, const std::vector<uint32_t>& tokens) {
    v1::BeginTurnRequest request;
    *request.mutable_lease() = lease;
    request.set_request_id("r");
    request.mutable_token_ids()->Add(tokens.begin(), tokens.end());
    request.set_model_fingerprint(kModel);
    return fake_->BeginTurn(request, Deadline());
  }
};

TEST_F(StateStoreClientTest, TurnGoesThroughAndIsReadBack) {
  const v1::AcquireLeaseResponse grant = Create("s");
  EXPECT_EQ(grant.session().id(), "s");
  EXPECT_FALSE(grant.log_branch().empty());
  ASSERT_OK_AND_ASSIGN(const v1::BeginTurnResponse turn, Begin(grant.lease(), {1, 2}));
  EXPECT_EQ(turn.session_tokens(), 2u);
  v1::AppendTokensRequest append;
  v1::AppendItem* item = append.add_items();
  *item->mutable_lease() = grant.lease();
  item->set_request_id("r");
  item->set_expected_length(2);
  item->add_token_ids(3);
  item->add_logprobs(-0.5);
  *append.add_items() = *item;
  append.mutable_items(1)->mutable_lease()->set_session_id("missing");
  append.add_items();
  ASSERT_OK_AND_ASSIGN(const v1::AppendTokensResponse appended, fake_->AppendTokens(append, Deadline()));
  ASSERT_EQ(appended.statuses_size(), 3);
  EXPECT_THAT(common::FromStatusProto(appended.statuses(0)), IsOk());
  EXPECT_THAT(common::FromStatusProto(appended.statuses(1)), StatusIs(StatusCode::kNotFound, HasSubstr("missing")));
  EXPECT_THAT(common::FromStatusProto(appended.statuses(2)), StatusIs(StatusCode::kInvalidArgument));
  v1::ReadTokensRequest read;
  read.set_session_id("s");
  read.set_begin(1);
  read.set_end(3);
  EXPECT_THAT(fake_->ReadTokens(read, Deadline()), IsOkAndHolds(ElementsAre(2, 3)));
}

TEST_F(StateStoreClientTest, ATurnIsFoundWithItsErrorAndNothingIsBegun) {
  const v1::AcquireLeaseResponse grant = Create("s");
  v1::FindTurnRequest find;
  find.set_session_id("s");
  ASSERT_OK_AND_ASSIGN(v1::FindTurnResponse found, fake_->FindTurn(find, Deadline()));
  EXPECT_FALSE(found.has_turn());
  ASSERT_OK(Begin(grant.lease(), {1, 2}));
  v1::AppendTokensRequest append;
  v1::AppendItem* item = append.add_items();
  *item->mutable_lease() = grant.lease();
  item->set_request_id("r");
  item->set_expected_length(2);
  item->set_finish_reason(v1::FINISH_REASON_ERROR);
  item->mutable_error()->set_code(13);
  item->mutable_error()->set_message("not finite");
  ASSERT_OK_AND_ASSIGN(const v1::AppendTokensResponse appended, fake_->AppendTokens(append, Deadline()));
  EXPECT_THAT(common::FromStatusProto(appended.statuses(0)), IsOk());
  for (const char* request_id : {"", "r"}) {
    find.set_request_id(request_id);
    ASSERT_OK_AND_ASSIGN(found, fake_->FindTurn(find, Deadline()));
    EXPECT_EQ(found.turn().request_id(), "r");
    EXPECT_EQ(found.turn().finish_reason(), v1::FINISH_REASON_ERROR);
    EXPECT_THAT(common::FromStatusProto(found.turn().error()),
                StatusIs(StatusCode::kInternal, HasSubstr("not finite")));
  }
  find.set_request_id("q");
  ASSERT_OK_AND_ASSIGN(found, fake_->FindTurn(find, Deadline()));
  EXPECT_FALSE(found.has_turn());
}

TEST_F(StateStoreClientTest, LongLogIsReadInPiecesAndJoined) {
  const v1::AcquireLeaseResponse grant = Create("s");
  std::vector<uint32_t> tokens(200000);
  std::iota(tokens.begin(), tokens.end(), 7);
  ASSERT_OK(Begin(grant.lease(), tokens));
  v1::ReadTokensRequest read;
  read.set_session_id("s");
  read.set_end(tokens.size());
  EXPECT_THAT(fake_->ReadTokens(read, Deadline()), IsOkAndHolds(tokens));
  read.set_begin(read.end());
  EXPECT_THAT(fake_->ReadTokens(read, Deadline()), IsOkAndHolds(ElementsAre()));
  read.set_begin(0);
  read.set_end(tokens.size() + 1);
  EXPECT_THAT(fake_->ReadTokens(read, Deadline()), StatusIs(StatusCode::kOutOfRange));
  read.set_session_id("t");
  read.set_end(0);
  EXPECT_THAT(fake_->ReadTokens(read, Deadline()), StatusIs(StatusCode::kNotFound));
}

TEST_F(StateStoreClientTest, EveryItemOfAnAppendHasItsOwnStatus) {
  const v1::AcquireLeaseResponse grant = Create("s");
  ASSERT_OK(Begin(grant.lease(), {}));
  v1::AppendTokensRequest append;
  append.add_items();  // Malformed, so the catalog never sees it.
  v1::AppendItem& good = *append.add_items();
  *good.mutable_lease() = grant.lease();
  good.set_request_id("r");
  good.add_token_ids(7);
  good.add_logprobs(-1);
  v1::AppendItem& unknown = *append.add_items();
  unknown = good;
  unknown.mutable_lease()->set_session_id("nobody");
  ASSERT_OK_AND_ASSIGN(const v1::AppendTokensResponse response, fake_->AppendTokens(append, Deadline()));
  ASSERT_EQ(response.statuses_size(), 3);
  EXPECT_EQ(response.statuses(0).code(), static_cast<int>(StatusCode::kInvalidArgument));
  EXPECT_EQ(response.statuses(1).code(), 0) << response.statuses(1).message();
  EXPECT_EQ(response.statuses(2).code(), static_cast<int>(StatusCode::kNotFound));
}

TEST_F(StateStoreClientTest, ASessionKeepsItsInitialState) {
  v1::CreateSessionRequest create;
  create.set_session_id("s");
  create.set_initial_state("poet@1a2b3c4d");
  ASSERT_OK_AND_ASSIGN(const v1::CreateSessionResponse created, fake_->CreateSession(create, Deadline()));
  EXPECT_EQ(created.session().initial_state(), "poet@1a2b3c4d");
  v1::GetSessionRequest get;
  get.set_session_id("s");
  ASSERT_OK_AND_ASSIGN(const v1::GetSessionResponse got, fake_->GetSession(get, Deadline()));
  EXPECT_EQ(got.session().initial_state(), "poet@1a2b3c4d");
}

TEST_F(StateStoreClientTest, ErrorsArriveWithTheirDetails) {
  v1::CreateSessionRequest create;
  create.set_session_id("no good");
  const auto invalid = fake_->CreateSession(create, Deadline());
  EXPECT_THAT(invalid, StatusIs(StatusCode::kInvalidArgument, HasSubstr("no good")));
  EXPECT_EQ(common::GetInvalidField(invalid.status()), std::string("session_id"));
  Create("s");
  v1::AcquireLeaseRequest acquire;
  acquire.set_session_id("s");
  acquire.set_holder("router-1");
  acquire.set_incarnation("1");
  acquire.mutable_ttl()->set_seconds(10);
  const auto held = fake_->AcquireLease(acquire, Deadline());
  EXPECT_THAT(held, StatusIs(StatusCode::kAborted));
  EXPECT_EQ(common::GetRetryDelay(held.status()), absl::Seconds(10));
  EXPECT_EQ(common::GetErrorReason(held.status()), std::string("LEASE_HELD"));
}

TEST_F(StateStoreClientTest, EveryCallOfASessionsLifeWorks) {
  const v1::AcquireLeaseResponse grant = Create("s");
  ASSERT_OK(Begin(grant.lease(), {1, 2, 3}));
  const std::string data(3 << 20, 'x');
  v1::CommitSnapshotRequest commit;
  *commit.mutable_lease() = grant.lease();
  commit.set_log_branch(grant.log_branch());
  v1::SnapshotManifest& manifest = *commit.mutable_manifest();
  manifest.set_snapshot_id("x");
  manifest.set_session_id("s");
  manifest.set_position(2);
  manifest.set_model_fingerprint(kModel);
  const v1::RecordInfo& info = *manifest.add_records() = InfoOf("x", 0, data);
  EXPECT_THAT(fake_->CommitSnapshot(commit, Deadline()), StatusIs(StatusCode::kDataLoss));
  ASSERT_OK(fake_->PutRecord(info, data, nullptr, Deadline()));
  ASSERT_OK(fake_->CommitSnapshot(commit, Deadline()));
  EXPECT_THAT(fake_->GetRecord(info, Deadline()), IsOkAndHolds(data));

  v1::ForkSessionRequest fork;
  fork.set_session_id("s");
  fork.set_position(2);
  fork.set_new_session_id("f");
  ASSERT_OK_AND_ASSIGN(const v1::ForkSessionResponse forked, fake_->ForkSession(fork, Deadline()));
  EXPECT_THAT(forked.session().snapshot_positions(), ElementsAre(2));
  ASSERT_OK_AND_ASSIGN(const v1::ListSessionsResponse list, fake_->ListSessions({}, Deadline()));
  ASSERT_EQ(list.sessions_size(), 2);
  v1::GetSessionRequest get;
  get.set_session_id("f");
  ASSERT_OK_AND_ASSIGN(const v1::GetSessionResponse got, fake_->GetSession(get, Deadline()));
  EXPECT_EQ(got.session().token_count(), 2u);

  v1::FindSnapshotRequest find;
  find.set_session_id("f");
  find.set_at_or_before(5);
  find.set_model_fingerprint(kModel);
  ASSERT_OK_AND_ASSIGN(const v1::FindSnapshotResponse found, fake_->FindSnapshot(find, Deadline()));
  EXPECT_EQ(found.manifest().snapshot_id(), "x");
  v1::DropSnapshotRequest drop;
  drop.set_session_id("f");
  drop.set_snapshot_id("x");
  ASSERT_OK(fake_->DropSnapshot(drop, Deadline()));
  ASSERT_OK_AND_ASSIGN(const v1::FindSnapshotResponse none, fake_->FindSnapshot(find, Deadline()));
  EXPECT_FALSE(none.has_manifest());
  EXPECT_THAT(fake_->GetRecord(info, Deadline()), StatusIs(StatusCode::kNotFound));

  v1::RenewLeasesRequest renew;
  *renew.add_leases() = grant.lease();
  renew.mutable_ttl()->set_seconds(10);
  ASSERT_OK_AND_ASSIGN(const v1::RenewLeasesResponse renewed, fake_->RenewLeases(renew, Deadline()));
  EXPECT_EQ(renewed.lost_size(), 0);
  v1::RewindSessionRequest rewind;
  *rewind.mutable_lease() = grant.lease();
  rewind.set_position(1);
  ASSERT_OK_AND_ASSIGN(const v1::RewindSessionResponse rewound, fake_->RewindSession(rewind, Deadline()));
  EXPECT_EQ(rewound.session().token_count(), 1u);
  v1::DeleteSessionRequest remove;
  *remove.mutable_lease() = grant.lease();
  ASSERT_OK(fake_->DeleteSession(remove, Deadline()));
  v1::ReleaseLeaseRequest release;
  *release.mutable_lease() = grant.lease();
  EXPECT_THAT(fake_->ReleaseLease(release, Deadline()), StatusIs(StatusCode::kNotFound));
}

TEST_F(StateStoreClientTest, FakeCanBeAwayOrLoseItsAnswers) {
  const v1::AcquireLeaseResponse grant = Create("s");
  fake_->FailWith(absl::UnavailableError("away"));
  EXPECT_THAT(Begin(grant.lease(), {1}), StatusIs(StatusCode::kUnavailable, HasSubstr("away")));
  fake_->FailWith(absl::OkStatus());
  fake_->LoseAnswersWith(absl::UnavailableError("lost"));
  EXPECT_THAT(Begin(grant.lease(), {1}), StatusIs(StatusCode::kUnavailable, HasSubstr("lost")));
  fake_->LoseAnswersWith(absl::OkStatus());
  ASSERT_OK_AND_ASSIGN(const v1::BeginTurnResponse turn, Begin(grant.lease(), {1}));
  EXPECT_TRUE(turn.existed());
  EXPECT_EQ(turn.session_tokens(), 1u);
}

}  // namespace
}  // namespace rwkv::state_store
