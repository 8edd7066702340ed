#include "services/router/rpc/uploads.h"

#include <grpcpp/alarm.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "services/common/grpc_status.h"

namespace rwkv::router {
namespace {

// An alarm does not go off sooner, so that whoever sets it can begin to read first.
constexpr absl::Duration kMinWait = absl::Milliseconds(10);

}  // namespace

absl::Status UploadShares::TooMuchInWork() const {
  return common::WithRetryInfo(
      absl::ResourceExhaustedError(absl::StrCat("already ", max_in_work_, " ", what_, "s are in work")),
      absl::Seconds(1));
}

absl::Status UploadShares::TakeBytes(int64_t bytes) {
  absl::MutexLock lock(&mu_);
  if (in_work_ >= max_in_work_) return TooMuchInWork();
  if (bytes > max_bytes_ - bytes_) {
    return common::WithRetryInfo(
        absl::ResourceExhaustedError(absl::StrCat("the ", what_, "s that are here have ", bytes_, " bytes; ", bytes,
                                                  " more are over the ", max_bytes_, " for all together")),
        absl::Seconds(1));
  }
  bytes_ += bytes;
  return absl::OkStatus();
}

absl::Status UploadShares::BeginWork() {
  absl::MutexLock lock(&mu_);
  if (in_work_ >= max_in_work_) return TooMuchInWork();
  ++in_work_;
  return absl::OkStatus();
}

void UploadShares::GiveBack(int64_t bytes, bool in_work) {
  absl::MutexLock lock(&mu_);
  bytes_ -= bytes;
  in_work_ -= in_work ? 1 : 0;
}

// Shared with the alarms, which may still go off when the upload is over.
struct Upload::Timer {
  UploadLimits limits;
  absl::Time end;
  absl::Mutex mu;
  std::function<void(const absl::Status&)> on_late ABSL_GUARDED_BY(mu);
  uint64_t pieces ABSL_GUARDED_BY(mu) = 0;  // Expected or come so far: an alarm of another one is void.
  bool late ABSL_GUARDED_BY(mu) = false;
  std::unique_ptr<grpc::Alarm> alarm ABSL_GUARDED_BY(mu);
};

Upload::Upload(UploadShares* shares, const UploadLimits& limits, std::function<void(const absl::Status&)> on_late)
    : shares_(shares), timer_(std::make_shared<Timer>()) {
  timer_->limits = limits;
  timer_->end = absl::Now() + limits.timeout;
  absl::MutexLock lock(&timer_->mu);
  timer_->on_late = std::move(on_late);
}

Upload::~Upload() {
  PieceCame();
  shares_->GiveBack(bytes_, in_work_);
}

absl::Status Upload::ExpectPiece() {
  const UploadLimits& limits = timer_->limits;
  const absl::Time now = absl::Now();
  const bool piece_first = now + limits.piece_timeout <= timer_->end;
  const absl::Status late = absl::DeadlineExceededError(
      piece_first
          ? absl::StrCat("no piece of the ", shares_->what(), " came for ", absl::FormatDuration(limits.piece_timeout))
          : absl::StrCat("the ", shares_->what(), " did not come within ", absl::FormatDuration(limits.timeout)));
  if (now >= timer_->end) return late;
  const absl::Time deadline = std::max(now + kMinWait, piece_first ? now + limits.piece_timeout : timer_->end);
  auto alarm = std::make_unique<grpc::Alarm>();
  grpc::Alarm& armed = *alarm;
  uint64_t expected;
  {
    absl::MutexLock lock(&timer_->mu);
    expected = ++timer_->pieces;
    alarm.swap(timer_->alarm);
  }
  // Neither under the lock: an alarm that is set late, or dropped, may call back at once.
  alarm = nullptr;
  armed.Set(absl::ToChronoTime(deadline), [timer = timer_, expected, late](bool went_off) {
    std::function<void(const absl::Status&)> on_late;
    {
      absl::MutexLock lock(&timer->mu);
      if (!went_off || timer->late || timer->pieces != expected) return;
      timer->late = true;
      on_late = std::move(timer->on_late);
    }
    on_late(late);
  });
  return absl::OkStatus();
}

bool Upload::PieceCame() {
  std::unique_ptr<grpc::Alarm> alarm;  // Dropped after the lock.
  absl::MutexLock lock(&timer_->mu);
  ++timer_->pieces;
  alarm.swap(timer_->alarm);
  return !timer_->late;
}

absl::Status Upload::Keep(int64_t bytes) {
  const absl::Status taken = shares_->TakeBytes(bytes);
  if (taken.ok()) bytes_ += bytes;
  return taken;
}

absl::Status Upload::BeginWork() {
  const absl::Status begun = shares_->BeginWork();
  in_work_ = begun.ok();
  return begun;
}

}  // namespace rwkv::router
