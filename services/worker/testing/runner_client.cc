#include "services/worker/testing/runner_client.h"

#include <deque>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace rwkv::worker {
namespace {

constexpr absl::Duration kPatience = absl::Seconds(30);

// What the epoch and the stream share.
class QueueSink final : public EpochSink {
 public:
  void Send(v1::ExecuteResponse response) override {
    absl::MutexLock lock(&mu_);
    if (end_.ok()) responses_.push_back(std::move(response));
  }
  void OnRoom() override {
    absl::MutexLock lock(&mu_);
    room_ = true;
  }
  void End(const absl::Status& why) override {
    absl::MutexLock lock(&mu_);
    if (end_.ok()) end_ = why;
  }

  absl::StatusOr<v1::ExecuteResponse> Pop() {
    absl::MutexLock lock(&mu_);
    if (!mu_.AwaitWithTimeout(absl::Condition(this, &QueueSink::HasResponse), kPatience)) {
      return absl::DeadlineExceededError("the worker has not answered for half a minute");
    }
    if (responses_.empty()) return end_;
    v1::ExecuteResponse response = std::move(responses_.front());
    responses_.pop_front();
    return response;
  }
  absl::Status WaitForRoom() {
    absl::MutexLock lock(&mu_);
    if (!mu_.AwaitWithTimeout(absl::Condition(this, &QueueSink::HasRoom), kPatience)) {
      return absl::DeadlineExceededError("the worker has taken no command for half a minute");
    }
    room_ = false;
    return absl::OkStatus();
  }
  bool ended() {
    absl::MutexLock lock(&mu_);
    return !end_.ok();
  }

 private:
  bool HasResponse() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !end_.ok() || !responses_.empty(); }
  bool HasRoom() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !end_.ok() || room_; }

  absl::Mutex mu_;
  std::deque<v1::ExecuteResponse> responses_ ABSL_GUARDED_BY(mu_);
  absl::Status end_ ABSL_GUARDED_BY(mu_);
  bool room_ ABSL_GUARDED_BY(mu_) = false;
};

class RunnerStream final : public ExecuteStream {
 public:
  explicit RunnerStream(StageRunner* runner) : runner_(runner), sink_(std::make_shared<QueueSink>()) {}
  ~RunnerStream() override { Cancel(); }

  absl::Status Write(const v1::ExecuteRequest& request) override {
    const std::shared_ptr<Epoch> epoch = this->epoch();
    if (epoch == nullptr) {
      absl::StatusOr<std::shared_ptr<Epoch>> opened = runner_->Open(request.open(), sink_);
      if (!opened.ok()) {
        sink_->End(opened.status());
        return opened.status();
      }
      absl::MutexLock lock(&mu_);
      epoch_ = *std::move(opened);
      return absl::OkStatus();
    }
    if (sink_->ended()) return absl::UnavailableError("the stream is over");
    v1::ExecuteRequest copy = request;
    while (!epoch->TryPush(copy)) {
      if (absl::Status status = sink_->WaitForRoom(); !status.ok()) return status;
    }
    return absl::OkStatus();
  }

  absl::StatusOr<v1::ExecuteResponse> Read() override { return sink_->Pop(); }
  void Listen(Heard heard) override { heard(absl::UnimplementedError("runner client: Listen")); }

  void Cancel() override {
    const absl::Status why = absl::CancelledError("cancelled by the caller");
    if (const std::shared_ptr<Epoch> epoch = this->epoch(); epoch != nullptr) epoch->End(why);
    sink_->End(why);
  }

 private:
  std::shared_ptr<Epoch> epoch() {
    absl::MutexLock lock(&mu_);
    return epoch_;
  }

  StageRunner* const runner_;
  const std::shared_ptr<QueueSink> sink_;
  absl::Mutex mu_;
  std::shared_ptr<Epoch> epoch_ ABSL_GUARDED_BY(mu_);
};

class RunnerClient final : public WorkerClient {
 public:
  RunnerClient(std::string address, StageRunner* runner) : address_(std::move(address)), runner_(runner) {}
  absl::StatusOr<v1::DescribeResponse> Describe(absl::Time deadline) override {
    return absl::UnimplementedError("runner client: Describe");
  }
  std::unique_ptr<ExecuteStream> Execute() override { return std::make_unique<RunnerStream>(runner_); }
  std::string address() const override { return address_; }

 private:
  const std::string address_;
  StageRunner* const runner_;
};

}  // namespace

std::shared_ptr<WorkerClient> MakeRunnerClient(std::string address, StageRunner* runner) {
  return std::make_shared<RunnerClient>(std::move(address), runner);
}

}  // namespace rwkv::worker
