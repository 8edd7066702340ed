#include "services/worker/rpc/worker_service.h"

#include <cstdint>
#include <deque>
#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "services/common/grpc_status.h"

namespace rwkv::worker {

// Counts Execute streams from their start to gRPC's last word on them.
class LiveStreams {
 public:
  void Add() {
    absl::MutexLock lock(&mu_);
    ++count_;
  }
  void Remove() {
    absl::MutexLock lock(&mu_);
    --count_;
  }
  void WaitUntilNone() {
    absl::MutexLock lock(&mu_);
    const auto none = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return count_ == 0; };
    mu_.Await(absl::Condition(&none));
  }

 private:
  absl::Mutex mu_;
  int count_ ABSL_GUARDED_BY(mu_) = 0;
};

namespace {

// Answers that the router has not read yet; then the device's thread waits.
constexpr int64_t kMaxUnsentBytes = int64_t{32} << 20;

// One Execute stream. gRPC calls the On... reactions, the epoch calls the sink's methods; it lives until both let go.
class ExecuteReactor final : public grpc::ServerBidiReactor<v1::ExecuteRequest, v1::ExecuteResponse>,
                             public EpochSink,
                             public std::enable_shared_from_this<ExecuteReactor> {
 public:
  static ExecuteReactor* Start(StageRunner* runner, std::shared_ptr<LiveStreams> live) {
    live->Add();
    auto reactor = std::make_shared<ExecuteReactor>(runner, std::move(live));
    absl::MutexLock lock(&reactor->mu_);
    reactor->self_ = reactor;
    reactor->ReadLocked();
    return reactor.get();
  }

  ExecuteReactor(StageRunner* runner, std::shared_ptr<LiveStreams> live) : runner_(runner), live_(std::move(live)) {}

  void OnReadDone(bool ok) override {
    if (!ok) return Leave(absl::CancelledError("the router ended the stream"));
    const std::shared_ptr<Epoch> epoch = this->epoch();
    if (epoch != nullptr) return PushAndRead(*epoch);
    if (!request_.has_open()) return End(absl::FailedPreconditionError("the first command is not `open`"));
    absl::StatusOr<std::shared_ptr<Epoch>> opened = runner_->Open(request_.open(), shared_from_this());
    if (!opened.ok()) return End(opened.status());
    bool left = false;
    {
      absl::MutexLock lock(&mu_);
      epoch_ = *opened;
      left = ended_;
      ReadLocked();
    }
    if (left) (*opened)->End(absl::CancelledError("the router ended the stream"));
  }

  void OnWriteDone(bool ok) override {
    {
      absl::MutexLock lock(&mu_);
      writing_ = false;
      unsent_bytes_ -= unsent_.front().ByteSizeLong();
      unsent_.pop_front();
      if (ended_) {
        FinishLocked();
      } else if (ok) {
        WriteLocked();
      }
    }
    if (!ok) Leave(absl::CancelledError("the router went away"));
  }

  void OnCancel() override { Leave(absl::CancelledError("the router went away")); }

  void OnDone() override {
    // gRPC's last word. Both go after the lock: `self` may be the last reference to this.
    const std::shared_ptr<LiveStreams> live = live_;
    {
      std::shared_ptr<ExecuteReactor> self;
      std::shared_ptr<Epoch> epoch;
      absl::MutexLock lock(&mu_);
      self.swap(self_);
      epoch.swap(epoch_);
    }
    live->Remove();
  }

  void Send(v1::ExecuteResponse response) override {
    const int64_t bytes = static_cast<int64_t>(response.ByteSizeLong());
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(this, &ExecuteReactor::HasRoomOrEnded));
    if (ended_) return;
    unsent_bytes_ += bytes;
    unsent_.push_back(std::move(response));
    if (!writing_) WriteLocked();
  }

  void OnRoom() override {
    // The refused command is still in request_: no read is outstanding.
    if (const std::shared_ptr<Epoch> epoch = this->epoch(); epoch != nullptr) PushAndRead(*epoch);
  }

  void End(const absl::Status& why) override {
    absl::MutexLock lock(&mu_);
    if (ended_) return;
    ended_ = true;
    why_ = why;
    if (!writing_) FinishLocked();
  }

 private:
  std::shared_ptr<Epoch> epoch() {
    absl::MutexLock lock(&mu_);
    return epoch_;
  }

  // From the stream's side: ends the epoch, which ends this.
  void Leave(const absl::Status& why) {
    if (const std::shared_ptr<Epoch> epoch = this->epoch(); epoch != nullptr) epoch->End(why);
    End(why);
  }

  void PushAndRead(Epoch& epoch) {
    if (!epoch.TryPush(request_)) return;  // OnRoom() comes.
    absl::MutexLock lock(&mu_);
    ReadLocked();
  }

  bool HasRoomOrEnded() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return ended_ || unsent_bytes_ < kMaxUnsentBytes; }

  // gRPC runs no reaction inside these calls, so the lock may be held; it orders them before Finish, after which none
  // is allowed.
  void ReadLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (!ended_) StartRead(&request_);
  }
  void WriteLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (ended_ || unsent_.empty()) return;
    writing_ = true;
    StartWrite(&unsent_.front());
  }
  void FinishLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { Finish(common::ToGrpcStatus(why_)); }

  StageRunner* const runner_;
  const std::shared_ptr<LiveStreams> live_;
  v1::ExecuteRequest request_;  // Belongs to the outstanding read, else to whoever handles it.

  absl::Mutex mu_;
  std::shared_ptr<ExecuteReactor> self_ ABSL_GUARDED_BY(mu_);
  std::shared_ptr<Epoch> epoch_ ABSL_GUARDED_BY(mu_);
  bool ended_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status why_ ABSL_GUARDED_BY(mu_);
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  std::deque<v1::ExecuteResponse> unsent_ ABSL_GUARDED_BY(mu_);  // The first is being written while `writing_`.
  int64_t unsent_bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace

WorkerService::WorkerService(v1::DescribeResponse description, StageRunner* runner, RouterRegistry* routers)
    : description_(std::move(description)),
      runner_(runner),
      routers_(routers),
      live_streams_(std::make_shared<LiveStreams>()) {}

WorkerService::~WorkerService() { live_streams_->WaitUntilNone(); }

grpc::ServerUnaryReactor* WorkerService::Describe(grpc::CallbackServerContext* context,
                                                  const v1::DescribeRequest* request, v1::DescribeResponse* response) {
  if (request->has_router()) routers_->Heard(request->router());
  *response = description_;
  response->set_draining(runner_->draining());
  const StageRunner::Driver driver = runner_->driver();
  response->set_driven_by(driver.router);
  response->set_epoch(driver.epoch);
  response->set_driver_is_silent(!driver.router.empty() && routers_->IsSilent(driver.router));
  for (v1::RouterAnnouncement& router : routers_->Lately()) *response->add_routers() = std::move(router);
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

grpc::ServerBidiReactor<v1::ExecuteRequest, v1::ExecuteResponse>* WorkerService::Execute(
    grpc::CallbackServerContext* context) {
  return ExecuteReactor::Start(runner_, live_streams_);
}

}  // namespace rwkv::worker
