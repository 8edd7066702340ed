#include "services/worker/link/grpc_link.h"

#include <thread>
#include <utility>

#include "absl/base/call_once.h"
#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "grpcpp/client_context.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/sync_stream.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/worker.grpc.pb.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/worker/link/inbox.h"
#include "services/worker/link/transfer.h"

namespace rwkv::worker {
namespace {

constexpr absl::Duration kOpenTimeout = absl::Seconds(10);  // For the receiving worker to open the epoch.
constexpr absl::Duration kCancelPoll = absl::Milliseconds(20);
constexpr char kAcceptedKey[] = "rwkv-link-epoch";
constexpr char kRowsKey[] = "rwkv-link-rows";
constexpr char kRowsByGrpc[] = "grpc";

void LogOpened(absl::string_view end, const std::string& epoch, const LinkChoice& choice, bool by_device,
               const std::string& why_not) {
  common::LogInfo("link_opened", {{"end", end},
                                  {"epoch", epoch},
                                  {"rows", by_device ? choice.device->kind() : kRowsByGrpc},
                                  {"version", by_device ? choice.device->version() : 0},
                                  {"why_grpc", why_not}});
}

}  // namespace

// The receiving side of every link to this worker. A handler occupies a thread for as long as its epoch lives.
class GrpcLinkService final : public v1::Link::Service {
 public:
  explicit GrpcLinkService(const LinkChoice& choice) : choice_(choice) {}

  void Add(const std::string& epoch, std::shared_ptr<Inbox> inbox) {
    absl::MutexLock lock(&mu_);
    inboxes_[epoch] = std::move(inbox);
  }

  void Remove(const std::string& epoch, const std::shared_ptr<Inbox>& inbox) {
    absl::MutexLock lock(&mu_);
    const auto it = inboxes_.find(epoch);
    if (it != inboxes_.end() && it->second == inbox) inboxes_.erase(it);
  }

  grpc::Status Transfer(grpc::ServerContext* context, TransferStream* stream) override {
    v1::TransferRequest request;
    if (!stream->Read(&request)) return common::ToGrpcStatus(absl::CancelledError("link: no epoch was named"));
    const std::string epoch = request.epoch();
    const std::shared_ptr<Inbox> inbox = WaitFor(epoch, *context);
    if (inbox == nullptr) {
      return common::ToGrpcStatus(absl::UnavailableError(absl::StrCat("link: epoch ", epoch, " is not open here")));
    }
    if (request.step_id() != 0 || request.rows() != 0) {
      return common::ToGrpcStatus(absl::InvalidArgumentError("link: the first message must have step 0 and no rows"));
    }
    if (request.width() != inbox->shape().width) {
      return common::ToGrpcStatus(absl::FailedPreconditionError(
          absl::StrCat("link: the stage before has width ", request.width(), ", this one ", inbox->shape().width)));
    }
    absl::StatusOr<LinkAgreement> agreement = Agree(request.offer(), choice_);
    if (!agreement.ok()) return common::ToGrpcStatus(agreement.status());
    const bool by_device = agreement->by_device;
    if (!inbox->Connect(context, stream, request.offer().pair_id(), *std::move(agreement))) {
      return common::ToGrpcStatus(absl::AbortedError(absl::StrCat("link: epoch ", epoch, " has its link already")));
    }
    context->AddInitialMetadata(kAcceptedKey, "accepted");
    context->AddInitialMetadata(kRowsKey, by_device ? std::string(choice_.device->kind()) : kRowsByGrpc);
    stream->SendInitialMetadata();
    absl::Status end = absl::UnavailableError("link: the stage before is gone");
    while (stream->Read(&request)) {
      if (absl::Status status = CheckTransfer(request, epoch, inbox->shape(), !by_device); !status.ok()) {
        end = status;
        break;
      }
      if (!inbox->Push(std::move(request))) {
        end = absl::UnavailableError("link: the epoch is over");
        break;
      }
    }
    inbox->Disconnect(end);
    return common::ToGrpcStatus(end);
  }

 private:
  // Null: not opened in time, or the caller left.
  std::shared_ptr<Inbox> WaitFor(const std::string& epoch, const grpc::ServerContext& context) {
    const auto is_open = [this, &epoch]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return inboxes_.contains(epoch); };
    const absl::Time deadline = absl::Now() + kOpenTimeout;
    absl::MutexLock lock(&mu_);
    // A cancelled call cannot wake a condition in the synchronous API, hence the short waits.
    while (!mu_.AwaitWithTimeout(absl::Condition(&is_open), kCancelPoll)) {
      if (context.IsCancelled() || absl::Now() >= deadline) return nullptr;
    }
    return inboxes_[epoch];
  }

  const LinkChoice choice_;
  absl::Mutex mu_;
  absl::flat_hash_map<std::string, std::shared_ptr<Inbox>> inboxes_ ABSL_GUARDED_BY(mu_);
};

namespace {

// A notification that many may give.
struct Stop {
  void Notify() {
    absl::call_once(once, [this] { notification.Notify(); });
  }
  absl::once_flag once;
  absl::Notification notification;
};

class GrpcReceiver final : public LinkReceiver {
 public:
  GrpcReceiver(GrpcLinkService& service, std::string epoch, const LinkShape& shape, const LinkChoice& choice)
      : service_(service), epoch_(std::move(epoch)), choice_(choice), inbox_(std::make_shared<Inbox>(shape)) {
    service_.Add(epoch_, inbox_);
  }
  ~GrpcReceiver() override {
    service_.Remove(epoch_, inbox_);
    Abort();
  }
  absl::Status Join() override {
    if (choice_.kind == LinkKind::kGrpc || choice_.device == nullptr) return absl::OkStatus();
    std::string pair_id;
    LinkAgreement agreement;
    RWKV_RETURN_IF_ERROR(inbox_->WaitConnected(&pair_id, &agreement));
    if (agreement.by_device) {
      RWKV_ASSIGN_OR_RETURN(rows_, choice_.device->Join(pair_id, false, inbox_->shape(), stop_.notification));
    }
    LogOpened("receive", epoch_, choice_, agreement.by_device, agreement.why_not);
    return absl::OkStatus();
  }
  DeviceRows* device_rows() override { return rows_.get(); }
  absl::Status Receive(LinkFrame& frame) override {
    frame.rows = rows_.get();
    return inbox_->Pop(frame);
  }
  bool Ready() override { return inbox_->Ready(); }
  void NotifyFrames(LinkReceiver::Coming coming) override { inbox_->NotifyFrames(std::move(coming)); }
  absl::Status Return(const v1::StepResult& drawn) override { return inbox_->Return(drawn); }
  void NotifyBroken(std::function<void(const absl::Status&)> broken) override {
    inbox_->NotifyBroken(std::move(broken));
  }
  void Abort() override {
    stop_.Notify();
    inbox_->Abort();
  }

 private:
  GrpcLinkService& service_;
  const std::string epoch_;
  const LinkChoice choice_;
  Stop stop_;
  std::unique_ptr<DeviceRows> rows_;  // Goes before `stop_`, which it looks at.
  const std::shared_ptr<Inbox> inbox_;
};

class GrpcSender final : public LinkSender {
 public:
  GrpcSender(std::string address, std::string epoch, const LinkShape& shape, const LinkChoice& choice,
             std::shared_ptr<grpc::Channel> channel)
      : address_(std::move(address)),
        epoch_(std::move(epoch)),
        shape_(shape),
        choice_(choice),
        stub_(v1::Link::NewStub(channel)) {}

  ~GrpcSender() override {
    context_.TryCancel();
    if (stream_ != nullptr) (void)End();
  }

  void NotifyDrawn(Drawn drawn) override { drawn_ = std::move(drawn); }

  absl::Status Connect() override {
    v1::TransferRequest hello = FrameToProto(epoch_, shape_, LinkFrame());
    RWKV_RETURN_IF_ERROR(MakeOffer(*hello.mutable_offer()));
    stream_ = stub_->Transfer(&context_);
    if (!stream_->Write(hello)) return End();
    stream_->WaitForInitialMetadata();
    // Metadata without our key is that of an error.
    const auto& metadata = context_.GetServerInitialMetadata();
    if (metadata.count(kAcceptedKey) == 0) return End();
    const auto answer = metadata.find(kRowsKey);
    const bool by_device = answer != metadata.end() && answer->second != kRowsByGrpc;
    back_ = std::thread([this] { ReadBack(); });
    if (by_device) {
      RWKV_ASSIGN_OR_RETURN(rows_, choice_.device->Join(hello.offer().pair_id(), true, shape_, stop_.notification));
    }
    // Stages without devices have nothing to agree on.
    if (choice_.kind != LinkKind::kGrpc && choice_.device != nullptr) {
      LogOpened("send", epoch_, choice_, by_device, by_device ? "" : "the next stage says why");
    }
    return absl::OkStatus();
  }

  DeviceRows* device_rows() override { return rows_.get(); }

  absl::Status Send(const LinkFrame& frame) override {
    if (stream_ == nullptr || !end_.ok()) return absl::UnavailableError("link: not connected");
    if (!stream_->Write(FrameToProto(epoch_, shape_, frame))) return End();
    return absl::OkStatus();
  }

  void Abort() override {
    stop_.Notify();
    context_.TryCancel();
  }

 private:
  absl::Status MakeOffer(v1::LinkOffer& offer) {
    offer.set_required(choice_.kind == LinkKind::kDevice);
    if (choice_.kind == LinkKind::kGrpc || choice_.device == nullptr) {
      offer.set_why_none(choice_.kind == LinkKind::kGrpc ? "it shall use gRPC" : choice_.why_none);
      return absl::OkStatus();
    }
    RWKV_ASSIGN_OR_RETURN(*offer.mutable_pair_id(), choice_.device->NewPairId());
    offer.set_kind(std::string(choice_.device->kind()));
    offer.set_version(choice_.device->version());
    offer.set_device(choice_.device->device());
    return absl::OkStatus();
  }

  void ReadBack() {
    v1::TransferResponse response;
    while (stream_->Read(&response)) {
      if (drawn_) drawn_(std::move(*response.mutable_drawn()));
    }
  }

  // Why the call is over. Waits for it, so only after a failed write, a cancel or an answer.
  absl::Status End() {
    if (!end_.ok()) return end_;
    if (back_.joinable()) back_.join();
    const absl::Status status = common::FromGrpcStatus(stream_->Finish());
    const absl::string_view message = status.ok() ? "the next stage ended it" : status.message();
    const absl::StatusCode code =
        status.code() == absl::StatusCode::kFailedPrecondition ? status.code() : absl::StatusCode::kUnavailable;
    end_ = absl::Status(code, absl::StrCat("link to ", address_, ": ", message));
    return end_;
  }

  const std::string address_;
  const std::string epoch_;
  const LinkShape shape_;
  const LinkChoice choice_;
  const std::unique_ptr<v1::Link::Stub> stub_;
  Stop stop_;
  std::unique_ptr<DeviceRows> rows_;
  grpc::ClientContext context_;
  Drawn drawn_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::TransferRequest, v1::TransferResponse>> stream_;
  std::thread back_;  // Reads what comes back, until the call is over.
  absl::Status end_;
};

}  // namespace

GrpcLinkTransport::GrpcLinkTransport(const LinkShape& shape, ChannelFactory make_channel, LinkChoice choice)
    : shape_(shape),
      make_channel_(std::move(make_channel)),
      choice_(std::move(choice)),
      service_(std::make_unique<GrpcLinkService>(choice_)) {}

GrpcLinkTransport::~GrpcLinkTransport() = default;

grpc::Service* GrpcLinkTransport::service() { return service_.get(); }

std::unique_ptr<LinkReceiver> GrpcLinkTransport::Accept(const std::string& epoch) {
  return std::make_unique<GrpcReceiver>(*service_, epoch, shape_, choice_);
}

std::unique_ptr<LinkSender> GrpcLinkTransport::Dial(const std::string& address, const std::string& epoch) {
  return std::make_unique<GrpcSender>(address, epoch, shape_, choice_, make_channel_(address));
}

}  // namespace rwkv::worker
