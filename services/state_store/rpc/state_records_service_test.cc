#include "services/state_store/rpc/state_records_service.h"

#include <sys/resource.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "gtest/gtest.h"
#include "rwkv/v1/state_store.grpc.pb.h"
#include "services/common/grpc_status.h"
#include "services/common/metrics.h"
#include "services/state_store/client/shared_window.h"
#include "services/state_store/records/record_store.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::ElementsAre;
using testing::IsEmpty;
using testing::Pair;
using testing::StatusIs;

// Notes what it is told, and keeps nothing.
class HintedRecords final : public RecordStore {
 public:
  absl::Status Put(const v1::RecordInfo&, absl::Span<const char>) override { return put; }
  absl::Status Read(const v1::RecordInfo& info, absl::Span<char> to) override {
    if (info.snapshot_id() != "there") return absl::NotFoundError("none");
    std::fill_n(to.begin(), info.bytes(), 'r');
    return absl::OkStatus();
  }
  absl::Status Check(const v1::RecordInfo&) override { return absl::DataLossError("none"); }
  absl::Status MakeDurable() override { return absl::OkStatus(); }
  void MakeDurableSoon(const std::string& snapshot_id, size_t records) override {
    hints.emplace_back(snapshot_id, records);
  }
  absl::Status Delete(const std::string&) override { return absl::OkStatus(); }
  absl::Status ForEach(absl::FunctionRef<void(const Stored&)>) override { return absl::OkStatus(); }
  int64_t bytes() const override { return 0; }

  absl::Status put;                                   // What it answers.
  std::vector<std::pair<std::string, size_t>> hints;  // Of one call after the other.
};

class StateRecordsServiceTest : public ::testing::Test {
 protected:
  StateRecordsServiceTest() {
    grpc::ServerBuilder builder;
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
  }

  // A call with one small record of "x", of so many in all.
  absl::Status PutRecords(uint32_t in_all) {
    const std::unique_ptr<v1::StateRecords::Stub> stub =
        v1::StateRecords::NewStub(server_->InProcessChannel(grpc::ChannelArguments()));
    v1::PutRecordsRequest head, piece;
    v1::RecordInfo& info = *head.mutable_infos()->add_records();
    info.set_snapshot_id("x");
    info.set_bytes(3);
    head.set_records_in_all(in_all);
    piece.set_data("abc");
    grpc::ClientContext context;
    v1::PutRecordsResponse response;
    const auto call = stub->PutRecords(&context, &response);
    call->Write(head);
    call->Write(piece);
    call->WritesDone();
    return common::FromGrpcStatus(call->Finish());
  }

  HintedRecords records_;
  const std::unique_ptr<common::Metrics> metrics_ = *common::Metrics::Create("");
  StateRecordsService service_{StateRecordsService::Options(), &records_, metrics_.get()};
  std::unique_ptr<grpc::Server> server_;
};

TEST_F(StateRecordsServiceTest, RecordsOfAStateOfSoManyAreToBeDurableSoon) {
  ASSERT_OK(PutRecords(24));
  EXPECT_THAT(records_.hints, ElementsAre(Pair("x", 24)));
}

TEST_F(StateRecordsServiceTest, RecordsThatWereNotPutOrAreOfUnknownManyAreNot) {
  ASSERT_OK(PutRecords(0));
  records_.put = absl::ResourceExhaustedError("full");
  EXPECT_THAT(PutRecords(24), StatusIs(StatusCode::kResourceExhausted));
  EXPECT_THAT(records_.hints, IsEmpty());
}

TEST_F(StateRecordsServiceTest, WhereSharedMemoryIsFullRecordsGoByTheConnection) {
  std::string name;
  ASSERT_OK_AND_ASSIGN(const SharedFile file, SharedFile::Make(&name));
  const std::unique_ptr<v1::StateRecords::Stub> stub =
      v1::StateRecords::NewStub(server_->InProcessChannel(grpc::ChannelArguments()));
  v1::GetRecordsRequest request;
  request.mutable_shared()->set_name(name);
  v1::RecordInfo& info = *request.mutable_infos()->add_records();
  info.set_snapshot_id("there");
  info.set_bytes(3);
  // A file of this process may have one byte: the second cannot be written, as where no memory is left.
  rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit full{1, before.rlim_max};
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &full), 0);
  grpc::ClientContext context;
  const auto call = stub->GetRecords(&context, request);
  v1::GetRecordsResponse response;
  std::string came;
  bool shared = false;
  while (call->Read(&response)) {
    came += response.data();
    shared |= response.shared();
  }
  const absl::Status status = common::FromGrpcStatus(call->Finish());
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, handler);
  std::remove(("/dev/shm/" + name).c_str());
  ASSERT_OK(status);
  EXPECT_EQ(came, "rrr");
  EXPECT_FALSE(shared);
}

}  // namespace
}  // namespace rwkv::state_store
