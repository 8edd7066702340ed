#include "services/worker/client/worker_client.h"

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/support/sync_stream.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "rwkv/v1/worker.grpc.pb.h"
#include "services/common/grpc_status.h"

namespace rwkv::worker {
namespace {

class GrpcExecuteStream final : public ExecuteStream {
 public:
  GrpcExecuteStream(std::string address, std::shared_ptr<grpc::Channel> channel)
      : address_(std::move(address)), stub_(v1::Worker::NewStub(channel)), stream_(stub_->Execute(&context_)) {}

  ~GrpcExecuteStream() override {
    context_.TryCancel();
    (void)Finish();
  }

  absl::Status Write(const v1::ExecuteRequest& request) override {
    if (stream_->Write(request)) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat("worker ", address_, ": the stream is over"));
  }

  absl::StatusOr<v1::ExecuteResponse> Read() override {
    {
      absl::MutexLock lock(&mu_);
      if (finished_) return end_;
    }
    v1::ExecuteResponse response;
    if (stream_->Read(&response)) return response;
    return Finish();
  }

  void Cancel() override { context_.TryCancel(); }

 private:
  // The end of the stream as an error, asked for once.
  absl::Status Finish() {
    absl::MutexLock lock(&mu_);
    if (finished_) return end_;
    const grpc::Status status = stream_->Finish();
    end_ = status.ok() ? absl::UnavailableError("the worker ended the stream") : common::FromGrpcStatus(status);
    end_ = absl::Status(end_.code(), absl::StrCat("worker ", address_, ": ", end_.message()));
    finished_ = true;
    return end_;
  }

  const std::string address_;
  grpc::ClientContext context_;
  const std::unique_ptr<v1::Worker::Stub> stub_;
  const std::unique_ptr<grpc::ClientReaderWriter<v1::ExecuteRequest, v1::ExecuteResponse>> stream_;

  absl::Mutex mu_;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status end_ ABSL_GUARDED_BY(mu_);
};

class GrpcWorkerClient final : public WorkerClient {
 public:
  GrpcWorkerClient(std::string address, std::shared_ptr<grpc::Channel> channel)
      : address_(std::move(address)), channel_(std::move(channel)), stub_(v1::Worker::NewStub(channel_)) {}

  absl::StatusOr<v1::DescribeResponse> Describe(absl::Time deadline) override {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(deadline));
    v1::DescribeResponse response;
    return Answer(stub_->Describe(&context, v1::DescribeRequest(), &response), &response);
  }

  void AskToDescribe(const v1::DescribeRequest& request, absl::Time deadline, Described done) override {
    struct Call {
      grpc::ClientContext context;
      v1::DescribeRequest request;
      v1::DescribeResponse response;
      Described done;
    };
    Call* const call = new Call;
    call->context.set_deadline(absl::ToChronoTime(deadline));
    call->request = request;
    call->done = std::move(done);
    stub_->async()->Describe(&call->context, &call->request, &call->response, [this, call](grpc::Status status) {
      const Described done = std::move(call->done);
      absl::StatusOr<v1::DescribeResponse> answer = Answer(status, &call->response);
      // Its context holds the channel, and whoever hears of the answer may end that and the process: this thread of
      // gRPC's would be the last to hold it then, and take it down while all else is gone.
      delete call;
      done(std::move(answer));
    });
  }

  std::unique_ptr<ExecuteStream> Execute() override { return std::make_unique<GrpcExecuteStream>(address_, channel_); }

  std::string address() const override { return address_; }

 private:
  absl::StatusOr<v1::DescribeResponse> Answer(const grpc::Status& status, v1::DescribeResponse* response) const {
    if (status.ok()) return std::move(*response);
    const absl::Status error = common::FromGrpcStatus(status);
    return absl::Status(error.code(), absl::StrCat("worker ", address_, ": ", error.message()));
  }

  const std::string address_;
  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<v1::Worker::Stub> stub_;
};

}  // namespace

std::unique_ptr<WorkerClient> MakeWorkerClient(std::string address, std::shared_ptr<grpc::Channel> channel) {
  return std::make_unique<GrpcWorkerClient>(std::move(address), std::move(channel));
}

}  // namespace rwkv::worker
