#include "services/state_store/rpc/validation.h"

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/grpc_status.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::AllOf;
using testing::HasSubstr;
using testing::IsOk;
using testing::StatusIs;

// An error that names the field, in words and as a google.rpc.BadRequest.
void ExpectInvalid(const absl::Status& status, absl::string_view field, absl::string_view shown = "") {
  EXPECT_THAT(status, StatusIs(StatusCode::kInvalidArgument,
                               AllOf(HasSubstr(std::string(field)), HasSubstr(std::string(shown)))));
  EXPECT_EQ(common::GetInvalidField(status), std::string(field));
}

TEST(ValidationTest, IdsHaveAGrammar) {
  for (const char* id : {"a", "A-Z_0.9:x", "0"}) EXPECT_THAT(ValidateId("id", id), IsOk()) << id;
  EXPECT_THAT(ValidateId("id", std::string(128, 'x')), IsOk());
  ExpectInvalid(ValidateId("id", ""), "id");
  ExpectInvalid(ValidateId("id", std::string(129, 'x')), "id", "...");
  ExpectInvalid(ValidateId("id", absl::string_view("a\0b", 3)), "id", "\\x00");
  for (const char* id : {"a b", "a/b", "\n", "\xc3\xa4", "a%"}) ExpectInvalid(ValidateId("id", id), "id");
}

TEST(ValidationTest, SessionsMayBeOfATenant) {
  for (const char* id : {"a", "acme@a:1", "a-.b_@x"}) EXPECT_THAT(ValidateSessionId("id", id), IsOk()) << id;
  for (const char* id : {"", "@a", "acme@", "a@b@c", "a b@c", "a/b@c", "a:b@c", "a@b/c"}) {
    ExpectInvalid(ValidateSessionId("id", id), "id");
  }
  ExpectInvalid(ValidateSessionId("id", std::string(65, 'x') + "@a"), "id");
  v1::ListSessionsRequest list;
  for (const char* token : {"", "acme@", "acme@a", "a"}) {
    list.set_page_token(token);
    EXPECT_THAT(Validate(list), IsOk()) << token;
  }
  for (const char* token : {"@", "a b@", "@a"}) {
    list.set_page_token(token);
    ExpectInvalid(Validate(list), "page_token");
  }
  v1::PutUsageRequest put;
  ExpectInvalid(Validate(put), "tenant");
  put.set_tenant("acme");
  ExpectInvalid(Validate(put), "source");
  put.set_source("router-0:1");
  EXPECT_THAT(Validate(put), IsOk());
}

TEST(ValidationTest, TtlsAreBounded) {
  google::protobuf::Duration ttl;
  EXPECT_FALSE(ValidateTtl("ttl", false, ttl).ok());
  EXPECT_FALSE(ValidateTtl("ttl", true, ttl).ok());
  ttl.set_seconds(-1);
  ExpectInvalid(ValidateTtl("ttl", true, ttl).status(), "ttl", "-1s");
  ttl.set_seconds(3601);
  ExpectInvalid(ValidateTtl("ttl", true, ttl).status(), "ttl", "1h1s");
  ttl.set_seconds(INT64_MAX);
  ExpectInvalid(ValidateTtl("ttl", true, ttl).status(), "ttl");
  ttl.set_seconds(3600);
  EXPECT_THAT(ValidateTtl("ttl", true, ttl), testing::IsOkAndHolds(absl::Hours(1)));
}

v1::Lease GoodLease() {
  v1::Lease lease;
  lease.set_session_id("s");
  lease.set_fencing_token(1);
  return lease;
}

TEST(ValidationTest, ATurnThatFailsSaysWhyAndNoOtherDoes) {
  v1::AppendItem item;
  *item.mutable_lease() = GoodLease();
  item.set_request_id("r");
  item.set_finish_reason(v1::FINISH_REASON_ERROR);
  ExpectInvalid(ValidateItem(item), "error.code", "FINISH_REASON_ERROR");
  item.mutable_error()->set_code(13);
  item.mutable_error()->set_message(std::string(4096, 'x'));
  EXPECT_OK(ValidateItem(item));
  item.mutable_error()->set_message(std::string(4097, 'x'));
  ExpectInvalid(ValidateItem(item), "error.message", "4097 bytes");
  item.mutable_error()->clear_message();
  item.set_finish_reason(v1::FINISH_REASON_LENGTH);
  ExpectInvalid(ValidateItem(item), "error.code", "13");
}

TEST(ValidationTest, InitialStateIsBounded) {
  v1::CreateSessionRequest request;
  request.set_session_id("s");
  request.set_initial_state(std::string(128, '@'));
  EXPECT_OK(Validate(request));
  request.set_initial_state(std::string(129, '@'));
  ExpectInvalid(Validate(request), "initial_state", "129 bytes");
}

TEST(ValidationTest, EveryRequestNamesItsBadSessionOrLease) {
  ExpectInvalid(Validate(v1::CreateSessionRequest()), "session_id");
  ExpectInvalid(Validate(v1::GetSessionRequest()), "session_id");
  ExpectInvalid(Validate(v1::ForkSessionRequest()), "session_id");
  ExpectInvalid(Validate(v1::RewindSessionRequest()), "lease.session_id");
  ExpectInvalid(Validate(v1::DeleteSessionRequest()), "lease.session_id");
  ExpectInvalid(Validate(v1::AcquireLeaseRequest()), "session_id");
  ExpectInvalid(Validate(v1::ReleaseLeaseRequest()), "lease.session_id");
  ExpectInvalid(Validate(v1::BeginTurnRequest()), "lease.session_id");
  ExpectInvalid(ValidateItem(v1::AppendItem()), "lease.session_id");
  ExpectInvalid(Validate(v1::ReadTokensRequest()), "session_id");
  ExpectInvalid(Validate(v1::CommitSnapshotRequest()), "lease.session_id");
  ExpectInvalid(Validate(v1::FindSnapshotRequest()), "session_id");
  ExpectInvalid(Validate(v1::FindTurnRequest()), "session_id");
  ExpectInvalid(Validate(v1::DropSnapshotRequest()), "snapshot_id");
  v1::ReleaseLeaseRequest release;
  *release.mutable_lease() = GoodLease();
  EXPECT_THAT(Validate(release), IsOk());
  release.mutable_lease()->set_fencing_token(0);
  ExpectInvalid(Validate(release), "lease.fencing_token");
}

TEST(ValidationTest, APrefixIsOfItsScopeAndItsTokens) {
  v1::FindPrefixRequest find;
  ExpectInvalid(Validate(find), "scope.model_fingerprint");
  find.mutable_scope()->set_model_fingerprint("abc");
  ExpectInvalid(Validate(find), "token_ids", "0");
  find.add_token_ids(1);
  EXPECT_THAT(Validate(find), IsOk());
  find.mutable_scope()->set_tenant("a b");
  ExpectInvalid(Validate(find), "tenant");

  v1::PutPrefixRequest put;
  put.mutable_scope()->set_model_fingerprint("abc");
  v1::SnapshotManifest& manifest = *put.mutable_manifest();
  manifest.set_snapshot_id("s");
  manifest.set_model_fingerprint("abc");
  manifest.set_position(16);
  v1::RecordInfo& info = *manifest.add_records();
  info.set_snapshot_id("s");
  info.set_bytes(1);
  for (uint32_t id = 0; id < 15; ++id) put.add_token_ids(id);
  ExpectInvalid(Validate(put), "token_ids", "15");
  put.add_token_ids(15);
  EXPECT_THAT(Validate(put), IsOk());
  manifest.set_position(17);
  ExpectInvalid(Validate(put), "manifest.position", "17");
  manifest.set_position(16);
  manifest.set_model_fingerprint("another");
  ExpectInvalid(Validate(put), "manifest.model_fingerprint");
  manifest.set_model_fingerprint("abc");
  manifest.set_session_id("a session's");
  ExpectInvalid(Validate(put), "manifest.session_id");
  ExpectInvalid(Validate(v1::DropPrefixRequest()), "snapshot_id");
}

TEST(ValidationTest, ListsAreBounded) {
  v1::ListSessionsRequest list;
  EXPECT_THAT(Validate(list), IsOk());
  list.set_page_size(1001);
  ExpectInvalid(Validate(list), "page_size", "1001");
  list.set_page_size(1000);
  list.set_page_token("a b");
  ExpectInvalid(Validate(list), "page_token");
  v1::RenewLeasesRequest renew;
  for (int i = 0; i <= kMaxRenewals; ++i) *renew.add_leases() = GoodLease();
  ExpectInvalid(Validate(renew), "leases");
  renew.clear_leases();
  *renew.add_leases() = GoodLease();
  renew.add_leases();
  ExpectInvalid(Validate(renew), "leases[1].session_id");
}

TEST(ValidationTest, TurnsAreChecked) {
  v1::BeginTurnRequest good;
  *good.mutable_lease() = GoodLease();
  good.set_request_id("any text \xc3\xa4");
  good.set_model_fingerprint("0123456789abcdef");
  EXPECT_THAT(Validate(good), IsOk());
  v1::BeginTurnRequest request = good;
  request.set_request_id("");
  ExpectInvalid(Validate(request), "request_id");
  request.set_request_id(std::string(129, 'x'));
  ExpectInvalid(Validate(request), "request_id", "129");
  request = good;
  request.set_model_fingerprint("");
  ExpectInvalid(Validate(request), "model_fingerprint");
  request = good;
  request.set_spec(std::string(kMaxSpecBytes + 1, 'x'));
  ExpectInvalid(Validate(request), "spec");
  request = good;
  request.mutable_token_ids()->Resize(kMaxPromptTokens + 1, 0);
  ExpectInvalid(Validate(request), "token_ids");
}

TEST(ValidationTest, AppendsAreChecked) {
  v1::AppendTokensRequest request;
  for (int i = 0; i < 2; ++i) *request.add_items()->mutable_lease() = GoodLease();
  ExpectInvalid(Validate(request), "items[1].lease.session_id", "\"s\" is in two items");
  for (int i = 0; i <= kMaxAppendItems; ++i) request.add_items();
  ExpectInvalid(Validate(request), "items");

  v1::AppendItem good;
  *good.mutable_lease() = GoodLease();
  good.set_request_id("r");
  good.add_token_ids(1);
  good.add_logprobs(-1);
  EXPECT_THAT(ValidateItem(good), IsOk());
  v1::AppendItem item = good;
  item.add_logprobs(-1);
  ExpectInvalid(ValidateItem(item), "logprobs", "2 for 1");
  item = good;
  item.set_finish_reason(static_cast<v1::FinishReason>(99));
  ExpectInvalid(ValidateItem(item), "finish_reason", "99");
  item = good;
  item.set_stop_token_id(0);
  ExpectInvalid(ValidateItem(item), "stop_token_id");
  item = good;
  item.set_stop_string("x");
  ExpectInvalid(ValidateItem(item), "stop_string");
  item.set_finish_reason(v1::FINISH_REASON_STOP_STRING);
  EXPECT_THAT(ValidateItem(item), IsOk());
}

TEST(ValidationTest, ReadingBackwardsIsRefused) {
  v1::ReadTokensRequest request;
  request.set_session_id("s");
  request.set_begin(2);
  request.set_end(1);
  ExpectInvalid(Validate(request), "begin");
}

TEST(ValidationTest, ManifestsAreChecked) {
  v1::CommitSnapshotRequest good;
  *good.mutable_lease() = GoodLease();
  good.set_log_branch("1");
  good.mutable_manifest()->set_snapshot_id("x");
  good.mutable_manifest()->set_session_id("s");
  good.mutable_manifest()->set_position(1);
  good.mutable_manifest()->set_model_fingerprint("m");
  for (int layer = 0; layer < 2; ++layer) {
    v1::RecordInfo* record = good.mutable_manifest()->add_records();
    record->set_snapshot_id("x");
    record->set_layer(layer);
    record->set_bytes(4);
  }
  EXPECT_THAT(Validate(good), IsOk());
  const auto expect = [&](const char* field, const std::function<void(v1::SnapshotManifest*)>& spoil) {
    v1::CommitSnapshotRequest request = good;
    spoil(request.mutable_manifest());
    ExpectInvalid(Validate(request), field);
  };
  expect("manifest.snapshot_id", [](auto* m) { m->set_snapshot_id(""); });
  expect("manifest.session_id", [](auto* m) { m->set_session_id("t"); });
  expect("manifest.position", [](auto* m) { m->set_position(0); });
  expect("manifest.model_fingerprint", [](auto* m) { m->set_model_fingerprint(""); });
  expect("manifest.records", [](auto* m) { m->clear_records(); });
  expect("manifest.records[1].layer", [](auto* m) { m->mutable_records(1)->set_layer(0); });
  expect("manifest.records[0].layer", [](auto* m) { m->mutable_records()->SwapElements(0, 1); });
  expect("manifest.records[1].snapshot_id", [](auto* m) { m->mutable_records(1)->set_snapshot_id("y"); });
  expect("manifest.records[0].bytes", [](auto* m) { m->mutable_records(0)->set_bytes(0); });
  expect("manifest.records[0].bytes", [](auto* m) { m->mutable_records(0)->set_bytes(kMaxRecordBytes + 1); });
}

TEST(ValidationTest, AnImportHasAllOfItsLogOrNoneOfIt) {
  v1::ImportSessionRequest good;
  good.set_session_id("s");
  v1::SnapshotManifest& manifest = *good.mutable_manifest();
  manifest.set_snapshot_id("x");
  manifest.set_session_id("s");
  manifest.set_position(2);
  manifest.set_model_fingerprint("m");
  manifest.add_records()->set_snapshot_id("x");
  manifest.mutable_records(0)->set_bytes(4);
  good.set_base(true);
  EXPECT_THAT(Validate(good), IsOk());
  good.add_token_ids(1);
  ExpectInvalid(Validate(good), "token_ids", "1 for a state at position 2");
  good.add_token_ids(2);
  EXPECT_THAT(Validate(good), IsOk());
  good.set_base(false);
  EXPECT_THAT(Validate(good), IsOk());

  const struct {
    const char* field;
    std::function<void(v1::ImportSessionRequest&)> change;
  } kCases[] = {
      {"session_id", [](auto& request) { request.set_session_id("a b"); }},
      {"initial_state", [](auto& request) { request.set_initial_state(std::string(129, 'x')); }},
      {"manifest.session_id", [](auto& request) { request.set_session_id("t"); }},
      {"manifest.snapshot_id", [](auto& request) { request.mutable_manifest()->clear_snapshot_id(); }},
      {"manifest.records", [](auto& request) { request.mutable_manifest()->clear_records(); }},
      {"manifest.records[0].layer",
       [](auto& request) { request.mutable_manifest()->mutable_records(0)->set_layer(1); }},
      {"manifest.position", [](auto& request) { request.mutable_manifest()->set_position((uint64_t{1} << 31) + 1); }},
      {"token_ids", [](auto& request) { request.clear_token_ids(); }},
      {"token_ids",
       [](auto& request) {
         request.mutable_token_ids()->Resize((1 << 19) + 1, 0);
         request.mutable_manifest()->set_position((1 << 19) + 1);
       }},
      {"manifest.position",
       [](auto& request) {
         request.clear_token_ids();
         request.mutable_manifest()->set_position(0);
       }},
  };
  for (const auto& test : kCases) {
    v1::ImportSessionRequest request = good;
    test.change(request);
    ExpectInvalid(Validate(request), test.field);
  }
}

}  // namespace
}  // namespace rwkv::state_store
