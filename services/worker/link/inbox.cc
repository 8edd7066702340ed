#include "services/worker/link/inbox.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"

namespace rwkv::worker {
namespace {

constexpr absl::Duration kJoinTimeout = absl::Seconds(60);  // For the stage before to come.

// memcpy() wants memory even for nothing.
void CopyBytes(const std::string& from, float* to) {
  if (!from.empty()) std::memcpy(to, from.data(), from.size());
}

}  // namespace

bool Inbox::Connect(grpc::ServerContext* context, TransferStream* stream, const std::string& pair_id,
                    LinkAgreement agreement) {
  absl::MutexLock back_lock(&back_mu_);
  absl::MutexLock lock(&mu_);
  if (connected_ || !end_.ok()) return false;
  connected_ = true;
  context_ = context;
  stream_ = stream;
  pair_id_ = pair_id;
  agreement_ = std::move(agreement);
  return true;
}

bool Inbox::Push(v1::TransferRequest request) {
  LinkReceiver::Coming coming;
  {
    absl::MutexLock lock(&mu_);
    coming = coming_;
  }
  const bool is_own = request.own_step().entries_size() > 0;
  if (coming) coming(is_own ? absl::make_optional(request.commands_before()) : absl::nullopt);
  absl::MutexLock lock(&mu_);
  mu_.Await(absl::Condition(this, &Inbox::HasRoom));
  if (!end_.ok()) return false;
  requests_.push_back(std::move(request));
  return true;
}

void Inbox::Disconnect(const absl::Status& why) {
  std::function<void(const absl::Status&)> broken;
  {
    absl::MutexLock lock(&back_mu_);
    stream_ = nullptr;
  }
  {
    absl::MutexLock lock(&mu_);
    context_ = nullptr;
    if (!end_.ok()) return;
    EndLocked(why);
    broken = std::move(broken_);
  }
  if (broken) broken(why);
}

absl::Status Inbox::WaitConnected(std::string* pair_id, LinkAgreement* agreement) {
  absl::MutexLock lock(&mu_);
  const auto decided = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return connected_ || !end_.ok(); };
  if (!mu_.AwaitWithTimeout(absl::Condition(&decided), kJoinTimeout)) {
    return absl::UnavailableError(
        absl::StrCat("link: the stage before did not come in ", absl::FormatDuration(kJoinTimeout)));
  }
  if (!end_.ok()) return end_;
  *pair_id = pair_id_;
  *agreement = agreement_;
  return absl::OkStatus();
}

absl::Status Inbox::Pop(LinkFrame& frame) {
  v1::TransferRequest request;
  {
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(this, &Inbox::HasRequest));
    // Frames that came before the end do not count any more: the epoch is over.
    if (!end_.ok()) return end_;
    request = std::move(requests_.front());
    requests_.pop_front();
    frame.header = HeaderOf(request);
    if (absl::Status status = CheckHeader(frame.header, shape_, next_step_); !status.ok()) return status;
    ++next_step_;
  }
  if (frame.rows != nullptr) return absl::OkStatus();
  CopyBytes(request.hidden(), frame.x);
  CopyBytes(request.v_first(), frame.v_first);
  return absl::OkStatus();
}

bool Inbox::Ready() {
  absl::MutexLock lock(&mu_);
  return HasRequest();
}

void Inbox::NotifyFrames(LinkReceiver::Coming coming) {
  absl::MutexLock lock(&mu_);
  coming_ = std::move(coming);
}

absl::Status Inbox::Return(const v1::StepResult& drawn) {
  v1::TransferResponse response;
  *response.mutable_drawn() = drawn;
  absl::MutexLock lock(&back_mu_);
  if (stream_ != nullptr && stream_->Write(response)) return absl::OkStatus();
  return absl::UnavailableError("link: the stage before does not hear what was drawn");
}

void Inbox::NotifyBroken(std::function<void(const absl::Status&)> broken) {
  absl::Status why;
  {
    absl::MutexLock lock(&mu_);
    if (end_.ok()) {
      broken_ = std::move(broken);
      return;
    }
    if (aborted_) return;
    why = end_;
  }
  broken(why);
}

void Inbox::Abort() {
  std::function<void(const absl::Status&)> dropped;  // Goes after the lock.
  LinkReceiver::Coming unheard;
  absl::MutexLock lock(&mu_);
  dropped = std::move(broken_);
  unheard = std::move(coming_);
  if (end_.ok()) aborted_ = true;
  EndLocked(absl::UnavailableError("link: aborted"));
  if (context_ != nullptr) context_->TryCancel();
}

void Inbox::EndLocked(const absl::Status& why) {
  if (!end_.ok()) return;
  end_ = why;
  requests_.clear();
}

}  // namespace rwkv::worker
