// One accepted epoch of a gRPC link: between the handler of its Transfer call and the receiver. Thread-safe.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/sync_stream.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/link/link.h"
#include "services/worker/link/transfer.h"

namespace rwkv::worker {

using TransferStream = grpc::ServerReaderWriter<v1::TransferResponse, v1::TransferRequest>;

class Inbox {
 public:
  explicit Inbox(const LinkShape& shape) : shape_(shape) {}

  // For the handler. False: another call feeds it, or it is over. On true the handler calls Disconnect before it
  // returns.
  bool Connect(grpc::ServerContext* context, TransferStream* stream, const std::string& pair_id,
               LinkAgreement agreement) ABSL_LOCKS_EXCLUDED(back_mu_, mu_);
  // Of a request that CheckTransfer() has accepted. Waits for room. False: it is over.
  bool Push(v1::TransferRequest request) ABSL_LOCKS_EXCLUDED(mu_);
  void Disconnect(const absl::Status& why) ABSL_LOCKS_EXCLUDED(back_mu_, mu_);

  // For the receiver. Waits for Connect(), a minute at most: what was agreed there.
  absl::Status WaitConnected(std::string* pair_id, LinkAgreement* agreement) ABSL_LOCKS_EXCLUDED(mu_);
  // These as LinkReceiver's.
  absl::Status Pop(LinkFrame& frame) ABSL_LOCKS_EXCLUDED(mu_);
  bool Ready() ABSL_LOCKS_EXCLUDED(mu_);
  void NotifyFrames(LinkReceiver::Coming coming) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status Return(const v1::StepResult& drawn) ABSL_LOCKS_EXCLUDED(back_mu_);
  void NotifyBroken(std::function<void(const absl::Status&)> broken) ABSL_LOCKS_EXCLUDED(mu_);
  void Abort() ABSL_LOCKS_EXCLUDED(mu_);

  const LinkShape& shape() const { return shape_; }

 private:
  static constexpr size_t kMaxFrames = 4;  // Received and not yet taken; then the transport's window fills.

  bool HasRoom() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !end_.ok() || requests_.size() < kMaxFrames; }
  bool HasRequest() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !end_.ok() || !requests_.empty(); }
  void EndLocked(const absl::Status& why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const LinkShape shape_;
  absl::Mutex mu_;
  std::deque<v1::TransferRequest> requests_ ABSL_GUARDED_BY(mu_);
  uint64_t next_step_ ABSL_GUARDED_BY(mu_) = 1;
  absl::Status end_ ABSL_GUARDED_BY(mu_);      // OK while the link stands.
  bool aborted_ ABSL_GUARDED_BY(mu_) = false;  // `end_` is our own doing.
  std::function<void(const absl::Status&)> broken_ ABSL_GUARDED_BY(mu_);
  LinkReceiver::Coming coming_ ABSL_GUARDED_BY(mu_);
  bool connected_ ABSL_GUARDED_BY(mu_) = false;
  std::string pair_id_ ABSL_GUARDED_BY(mu_);  // Once connected.
  LinkAgreement agreement_ ABSL_GUARDED_BY(mu_);
  grpc::ServerContext* context_ ABSL_GUARDED_BY(mu_) = nullptr;
  absl::Mutex back_mu_ ABSL_ACQUIRED_BEFORE(mu_);               // Held while a message is written.
  TransferStream* stream_ ABSL_GUARDED_BY(back_mu_) = nullptr;  // While the handler is there.
};

}  // namespace rwkv::worker
