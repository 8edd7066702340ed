#include "services/worker/client/worker_client.h"

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/support/client_callback.h>

#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "rwkv/v1/worker.grpc.pb.h"
#include "services/common/grpc_status.h"

namespace rwkv::worker {
namespace {

using ExecuteReactor = grpc::ClientBidiReactor<v1::ExecuteRequest, v1::ExecuteResponse>;

// By gRPC's callbacks, so that the thread that finds an answer on the connection hands it on itself.
class GrpcExecuteStream final : public ExecuteStream, private ExecuteReactor {
 public:
  GrpcExecuteStream(std::string address, std::shared_ptr<grpc::Channel> channel)
      : address_(std::move(address)), stub_(v1::Worker::NewStub(channel)) {
    stub_->async()->Execute(&context_, this);
    AddHold();  // Reads and writes begin outside of reactions: until CloseIfIdle().
    StartCall();
  }

  ~GrpcExecuteStream() override {
    context_.TryCancel();
    {
      absl::MutexLock lock(&mu_);
      closing_ = true;
      CloseIfIdle();
    }
    done_.WaitForNotification();
  }

  absl::Status Write(const v1::ExecuteRequest& request) override {
    absl::MutexLock lock(&mu_);
    if (!closing_) {
      writing_ = true;
      StartWrite(&request);
      const auto written = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !writing_; };
      mu_.Await(absl::Condition(&written));
      if (written_) return absl::OkStatus();
    }
    return absl::UnavailableError(absl::StrCat("worker ", address_, ": the stream is over"));
  }

  absl::StatusOr<v1::ExecuteResponse> Read() override {
    {
      absl::MutexLock lock(&mu_);
      ReadLocked();
      const auto read = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !reading_; };
      mu_.Await(absl::Condition(&read));
      if (!closing_) return std::move(response_);
    }
    done_.WaitForNotification();
    return end_;
  }

  void Listen(Heard heard) override {
    absl::MutexLock lock(&mu_);
    heard_ = std::move(heard);
    ReadLocked();
  }

  void Cancel() override { context_.TryCancel(); }

 private:
  void OnReadDone(bool ok) override {
    const Heard* heard = nullptr;
    {
      absl::MutexLock lock(&mu_);
      if (ok && heard_) {
        heard = &heard_;
      } else {
        reading_ = false;
        closing_ |= !ok;
        CloseIfIdle();
      }
    }
    if (heard == nullptr) return;
    (*heard)(std::move(response_));
    absl::MutexLock lock(&mu_);
    reading_ = false;
    ReadLocked();
    CloseIfIdle();
  }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&mu_);
    writing_ = false;
    written_ = ok;
    CloseIfIdle();
  }

  void OnDone(const grpc::Status& status) override {
    end_ = status.ok() ? absl::UnavailableError("the worker ended the stream") : common::FromGrpcStatus(status);
    end_ = absl::Status(end_.code(), absl::StrCat("worker ", address_, ": ", end_.message()));
    const Heard* heard = nullptr;
    {
      absl::MutexLock lock(&mu_);
      if (heard_) heard = &heard_;
    }
    if (heard != nullptr) (*heard)(end_);
    done_.Notify();  // The last: whoever waits for it destroys this.
  }

  // gRPC runs no reaction inside these calls, so the lock may be held.
  void ReadLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (closing_) return;
    reading_ = true;
    StartRead(&response_);
  }
  // OnDone() comes once nothing is under way and nothing more can be.
  void CloseIfIdle() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (closing_ && !reading_ && !writing_ && std::exchange(held_, false)) RemoveHold();
  }

  const std::string address_;
  grpc::ClientContext context_;
  const std::unique_ptr<v1::Worker::Stub> stub_;

  absl::Mutex mu_;
  Heard heard_ ABSL_GUARDED_BY(mu_);  // Set once; called without the lock.
  v1::ExecuteResponse response_;      // gRPC's while reading_.
  bool reading_ ABSL_GUARDED_BY(mu_) = false;
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool written_ ABSL_GUARDED_BY(mu_) = false;  // The last command.
  bool closing_ ABSL_GUARDED_BY(mu_) = false;  // Nothing begins any more.
  bool held_ ABSL_GUARDED_BY(mu_) = true;

  absl::Status end_;  // Before done_.
  absl::Notification done_;
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
