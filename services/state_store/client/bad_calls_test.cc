// Clients and stores that break the rules, or misbehave.
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "gtest/gtest.h"
#include "rwkv/v1/state_store.grpc.pb.h"
#include "services/common/grpc_status.h"
#include "services/state_store/client/fake_store_fixture.h"
#include "services/state_store/client/state_store_client.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::StatusIs;

// --- Streams to the real service --------------------------------------------------------------------------------------

class RecordStreamsTest : public FakeStoreTest {
 protected:
  // A call of the generated stub, with these messages.
  template <typename Method, typename Request>
  absl::Status Put(Method method, const std::vector<Request>& messages) {
    const auto stub = v1::StateRecords::NewStub(fake_->channel());
    grpc::ClientContext context;
    const auto call = method(*stub, &context);
    for (const Request& message : messages) {
      if (!call->Write(message)) break;
    }
    call->WritesDone();
    return common::FromGrpcStatus(call->Finish());
  }
};

TEST_F(RecordStreamsTest, RecordStreamsThatBreakTheRulesAreRefused) {
  v1::PutRecordResponse response;
  const auto put = [&](const std::vector<v1::PutRecordRequest>& messages) {
    return Put(
        [&](v1::StateRecords::Stub& stub, grpc::ClientContext* context) { return stub.PutRecord(context, &response); },
        messages);
  };
  const std::string data = "abcdef";
  v1::PutRecordRequest info, piece, big;
  *info.mutable_info() = InfoOf("x", 0, data);
  piece.set_data("abc");
  EXPECT_THAT(put({}), StatusIs(StatusCode::kInvalidArgument, HasSubstr("info")));
  EXPECT_THAT(put({piece}), StatusIs(StatusCode::kInvalidArgument, HasSubstr("info")));
  EXPECT_THAT(put({info, info}), StatusIs(StatusCode::kInvalidArgument, HasSubstr("data")));
  EXPECT_THAT(put({info, piece}), StatusIs(StatusCode::kDataLoss, HasSubstr("3 bytes")));
  EXPECT_THAT(put({info, piece, piece, piece}), StatusIs(StatusCode::kDataLoss, HasSubstr("more than")));
  EXPECT_THAT(put({info, piece, piece}), StatusIs(StatusCode::kDataLoss, HasSubstr("CRC32C")));
  big = info;
  big.mutable_info()->set_bytes(2 << 20);
  piece.set_data(std::string((1 << 20) + 1, 'x'));
  EXPECT_THAT(put({big, piece}), StatusIs(StatusCode::kInvalidArgument, HasSubstr("1048577 bytes in one message")));
  big.mutable_info()->set_bytes((uint64_t{256} << 20) + 1);
  EXPECT_THAT(put({big}), StatusIs(StatusCode::kInvalidArgument, HasSubstr("info.bytes")));
  piece.set_data(data);
  EXPECT_THAT(put({info, piece}), IsOk());
  // Of a later version.
  piece.GetReflection()->MutableUnknownFields(&piece)->AddVarint(100, 1);
  EXPECT_THAT(put({info, piece}), IsOk());
  EXPECT_THAT(put({info, piece, piece}), StatusIs(StatusCode::kDataLoss, HasSubstr("more than")));
}

TEST_F(RecordStreamsTest, StreamsOfSeveralRecordsThatBreakTheRulesAreRefused) {
  v1::PutRecordsResponse response;
  const auto put = [&](const std::vector<v1::PutRecordsRequest>& messages) {
    return Put(
        [&](v1::StateRecords::Stub& stub, grpc::ClientContext* context) { return stub.PutRecords(context, &response); },
        messages);
  };
  const auto piece = [](const std::string& data) {
    v1::PutRecordsRequest request;
    request.set_data(data);
    return request;
  };
  const std::string records[] = {"abc", "defgh"};
  v1::PutRecordsRequest head;
  for (int i = 0; i < 2; ++i) *head.mutable_infos()->add_records() = InfoOf("x", i + 3, records[i]);
  EXPECT_THAT(put({}), StatusIs(StatusCode::kInvalidArgument, HasSubstr("infos")));
  EXPECT_THAT(put({piece("abc")}), StatusIs(StatusCode::kInvalidArgument, HasSubstr("infos")));
  EXPECT_THAT(put({v1::PutRecordsRequest()}), StatusIs(StatusCode::kInvalidArgument, HasSubstr("infos")));
  EXPECT_THAT(put({head, head}), StatusIs(StatusCode::kInvalidArgument, HasSubstr("data")));
  EXPECT_THAT(put({head, piece("abc")}), StatusIs(StatusCode::kDataLoss, HasSubstr("record x/4: 0 bytes of the 5")));
  EXPECT_THAT(put({head, piece("abcdefgh")}), StatusIs(StatusCode::kDataLoss, HasSubstr("record x/3: more than")));
  EXPECT_THAT(put({head, piece("abc"), piece("defgh"), piece("i")}),
              StatusIs(StatusCode::kDataLoss, HasSubstr("record x/4: more than")));
  EXPECT_THAT(put({head, piece("abc"), piece("defgg")}), StatusIs(StatusCode::kDataLoss, HasSubstr("CRC32C")));
  for (const bool other_snapshot : {true, false}) {
    v1::PutRecordsRequest wrong = head;
    if (other_snapshot) {
      wrong.mutable_infos()->mutable_records(1)->set_snapshot_id("y");
    } else {
      wrong.mutable_infos()->mutable_records(1)->set_layer(3);
    }
    EXPECT_THAT(put({wrong, piece("abc"), piece("defgh")}),
                StatusIs(StatusCode::kInvalidArgument, HasSubstr("infos.records[1]")));
  }
  EXPECT_THAT(fake_->GetRecord(head.infos().records(0), Deadline()), StatusIs(StatusCode::kNotFound));
  ASSERT_OK(put({head, piece("a"), piece("bc"), piece("def"), piece("gh"), piece("")}));
  const std::vector<v1::RecordInfo> infos(head.infos().records().begin(), head.infos().records().end());
  std::string read[] = {std::string(3, ' '), std::string(5, ' ')};
  const absl::Span<char> to[] = {absl::MakeSpan(read[0]), absl::MakeSpan(read[1])};
  ASSERT_OK(fake_->ReadRecords(infos, to, Deadline()));
  EXPECT_THAT(read, ElementsAre("abc", "defgh"));
  // By the call of older workers too.
  const auto stub = v1::StateRecords::NewStub(fake_->channel());
  grpc::ClientContext context;
  v1::GetRecordRequest get;
  *get.mutable_info() = infos[1];
  v1::GetRecordResponse got;
  const auto reader = stub->GetRecord(&context, get);
  ASSERT_TRUE(reader->Read(&got));
  EXPECT_EQ(got.data(), "defgh");
  EXPECT_FALSE(reader->Read(&got));
  EXPECT_TRUE(reader->Finish().ok());
}

// --- Against a server that misbehaves -------------------------------------------------------------------------------

class BadStore : public v1::StateCatalog::Service, public v1::StateRecords::Service {
 public:
  grpc::Status BeginTurn(grpc::ServerContext*, const v1::BeginTurnRequest*, v1::BeginTurnResponse*) override {
    return Fail();
  }
  grpc::Status AppendTokens(grpc::ServerContext*, const v1::AppendTokensRequest*, v1::AppendTokensResponse*) override {
    return Fail();
  }
  grpc::Status ReadTokens(grpc::ServerContext*, const v1::ReadTokensRequest*,
                          grpc::ServerWriter<v1::ReadTokensResponse>* writer) override {
    v1::ReadTokensResponse response;
    response.add_token_ids(1);
    writer->Write(response);
    return Fail();
  }
  grpc::Status GetRecords(grpc::ServerContext*, const v1::GetRecordsRequest*,
                          grpc::ServerWriter<v1::GetRecordsResponse>* writer) override {
    v1::GetRecordsResponse response;
    response.set_data(record);
    writer->Write(response);
    return Fail();
  }

  std::atomic<int> calls{0};
  int failures = 0;
  grpc::StatusCode code = grpc::StatusCode::UNAVAILABLE;  // Of the failures.
  std::string record;

 private:
  grpc::Status Fail() { return ++calls <= failures ? grpc::Status(code, "restarting") : grpc::Status::OK; }
};

class BadStoreTest : public ::testing::Test {
 protected:
  BadStoreTest() {
    grpc::ServerBuilder builder;
    builder.RegisterService(static_cast<v1::StateCatalog::Service*>(&store_));
    builder.RegisterService(static_cast<v1::StateRecords::Service*>(&store_));
    server_ = builder.BuildAndStart();
    catalog_ = NewCatalogClient(server_->InProcessChannel({}));
    records_ = NewRecordsClient(server_->InProcessChannel({}));
  }
  ~BadStoreTest() override { server_->Shutdown(); }

  BadStore store_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<CatalogClient> catalog_;
  std::unique_ptr<RecordsClient> records_;
};

TEST_F(BadStoreTest, CallsThatMayRunTwiceAreRetriedAFewTimes) {
  store_.failures = 2;
  EXPECT_THAT(catalog_->BeginTurn({}, Deadline()), IsOk());
  EXPECT_EQ(store_.calls, 3);
  store_.failures = 1000;
  store_.calls = 0;
  EXPECT_THAT(catalog_->BeginTurn({}, Deadline()), StatusIs(StatusCode::kUnavailable, HasSubstr("restarting")));
  EXPECT_EQ(store_.calls, 4);
}

TEST_F(BadStoreTest, OnlyUnavailableIsRetried) {
  store_.failures = 1000;
  for (const grpc::StatusCode code : {grpc::StatusCode::ABORTED, grpc::StatusCode::RESOURCE_EXHAUSTED,
                                      grpc::StatusCode::DATA_LOSS, grpc::StatusCode::INTERNAL}) {
    store_.code = code;
    store_.calls = 0;
    EXPECT_THAT(catalog_->BeginTurn({}, Deadline()), StatusIs(static_cast<StatusCode>(code)));
    EXPECT_EQ(store_.calls, 1) << code;
  }
}

TEST_F(BadStoreTest, AppendIsNeverRetried) {
  store_.failures = 1;
  EXPECT_THAT(catalog_->AppendTokens({}, Deadline()), StatusIs(StatusCode::kUnavailable));
  EXPECT_EQ(store_.calls, 1);
}

TEST_F(BadStoreTest, RetriesEndWithTheDeadline) {
  store_.failures = 1000;
  EXPECT_THAT(catalog_->BeginTurn({}, absl::Now() + absl::Milliseconds(5)),
              testing::AnyOf(StatusIs(StatusCode::kUnavailable), StatusIs(StatusCode::kDeadlineExceeded)));
  EXPECT_LE(store_.calls, 1);
}

TEST_F(BadStoreTest, BrokenReadStartsAgainFromTheBeginning) {
  store_.failures = 1;
  v1::ReadTokensRequest read;
  read.set_end(1);
  EXPECT_THAT(catalog_->ReadTokens(read, Deadline()), IsOkAndHolds(ElementsAre(1)));
}

TEST_F(BadStoreTest, TokensThatDoNotFitTheRangeAreAnError) {
  v1::ReadTokensRequest read;
  read.set_end(2);
  EXPECT_THAT(catalog_->ReadTokens(read, Deadline()), StatusIs(StatusCode::kInternal, HasSubstr("1 tokens")));
}

TEST_F(BadStoreTest, RecordThatIsNotWhatItsInfoSaysIsDataLoss) {
  const std::string data = "abcdef";
  const v1::RecordInfo info = InfoOf("x", 0, data);
  for (const char* wrong : {"abcdeg", "abcde", "abcdefg", ""}) {
    store_.record = wrong;
    EXPECT_THAT(records_->GetRecord(info, Deadline()), StatusIs(StatusCode::kDataLoss, HasSubstr("record x/0")))
        << wrong;
  }
  store_.record = std::string(1 << 20, 'x');  // Not more is kept than was asked for.
  EXPECT_THAT(records_->GetRecord(info, Deadline()), StatusIs(StatusCode::kDataLoss, HasSubstr("more than 6 bytes")));
  std::string read[] = {std::string(6, ' '), std::string(6, ' ')};
  const absl::Span<char> to[] = {absl::MakeSpan(read[0]), absl::MakeSpan(read[1])};
  store_.record = data;  // Only the first of two.
  EXPECT_THAT(records_->ReadRecords({info, info}, to, Deadline()),
              StatusIs(StatusCode::kDataLoss, HasSubstr("0 of 6 bytes came")));
  store_.record = data + data;  // In one message.
  EXPECT_THAT(records_->ReadRecords({info, info}, to, Deadline()),
              StatusIs(StatusCode::kDataLoss, HasSubstr("more than 6 bytes")));
  store_.record = data;
  EXPECT_THAT(records_->GetRecord(info, Deadline()), IsOkAndHolds(data));
  EXPECT_THAT(records_->PutRecord(info, absl::MakeConstSpan(data).first(3), nullptr, Deadline()),
              StatusIs(StatusCode::kDataLoss, HasSubstr("3 bytes")));
}

}  // namespace
}  // namespace rwkv::state_store
