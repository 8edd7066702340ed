// What calls that read a whole document may take of the router, and how long they may keep it waiting. A client that
// begins an upload and falls silent holds nothing that others need, and not for long.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace rwkv::router {

struct UploadLimits {
  absl::Duration piece_timeout = absl::Seconds(10);  // For the next piece, the first one included.
  absl::Duration timeout = absl::Minutes(5);         // For all of them.
};

// Of all uploads together. Thread-safe.
class UploadShares {
 public:
  // `max_in_work` uploads may be worked on at a time, and `max_bytes` of them be there, come in part or worked on.
  // `what` one is called in messages.
  UploadShares(int max_in_work, int64_t max_bytes, absl::string_view what = "document")
      : max_in_work_(max_in_work), max_bytes_(max_bytes), what_(what) {}

  const std::string& what() const { return what_; }

  // kResourceExhausted with RetryInfo: there is no room. Nothing is taken then. Bytes are refused too while as many
  // documents as may be are in work: what cannot be worked on need not be sent.
  absl::Status TakeBytes(int64_t bytes) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status BeginWork() ABSL_LOCKS_EXCLUDED(mu_);
  void GiveBack(int64_t bytes, bool in_work) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  absl::Status TooMuchInWork() const;

  const int max_in_work_;
  const int64_t max_bytes_;
  const std::string what_;
  absl::Mutex mu_;
  int in_work_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

// One upload's shares and its clock. Its methods are called by one thread at a time.
class Upload {
 public:
  // `shares` outlives it. `on_late` is called at most once, on a thread of gRPC, when an expected piece does not come
  // in time, with the error for the client; it may end the call and with it this object.
  Upload(UploadShares* shares, const UploadLimits& limits, std::function<void(const absl::Status&)> on_late);
  ~Upload();  // Gives back what it took.
  Upload(const Upload&) = delete;
  Upload& operator=(const Upload&) = delete;

  // kDeadlineExceeded: the time for all pieces is over, none is expected.
  absl::Status ExpectPiece();
  // False: too late, on_late has been called or is about to be.
  bool PieceCame();
  // Of a piece that came, as UploadShares::TakeBytes.
  absl::Status Keep(int64_t bytes);
  // All of it is there.
  absl::Status BeginWork();

 private:
  struct Timer;

  UploadShares* const shares_;
  const std::shared_ptr<Timer> timer_;
  int64_t bytes_ = 0;
  bool in_work_ = false;
};

}  // namespace rwkv::router
