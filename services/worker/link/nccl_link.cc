#include "services/worker/link/nccl_link.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "services/worker/link/nccl_status.h"

namespace rwkv::worker {
namespace {

constexpr absl::Duration kSpin = absl::Milliseconds(2);  // As long as a transfer is usually taken in.
constexpr absl::Duration kNap = absl::Microseconds(100);

// Rank 0 sends, rank 1 receives.
class NcclRows final : public DeviceRows {
 public:
  NcclRows(const nccl::Nccl& nccl, bool sends, const LinkShape& shape, const NcclLimits& limits,
           const absl::Notification& stop)
      : nccl_(nccl), sends_(sends), shape_(shape), limits_(limits), stop_(stop) {}
  ~NcclRows() override { (void)End(); }

  absl::Status Init(const nccl::UniqueId& id) {
    nccl::Config config;
    const nccl::Result result = nccl_.comm_init_rank_config(&communicator_, 2, id, sends_ ? 0 : 1, &config);
    return Settle(result, "init", limits_.init);
  }

  absl::Status Move(int64_t rows, float* x, float* v_first, kernels::Stream& stream) override {
    if (communicator_ == nullptr) return absl::UnavailableError("NCCL: the pair was aborted");
    // One group: the two transfers are one for NCCL, and cannot wait for each other.
    RWKV_RETURN_IF_ERROR(ToStatus(nccl_.group_start(), "group start"));
    nccl::Result result = One(x, rows * shape_.width, stream);
    if (result == nccl::kSuccess && shape_.v_first_width > 0) {
      result = One(v_first, rows * shape_.v_first_width, stream);
    }
    const nccl::Result end = nccl_.group_end();  // Also after an error: the group is the thread's.
    // Until NCCL has taken it nothing else may be enqueued: it would come before.
    return Settle(result == nccl::kSuccess ? end : result, sends_ ? "send" : "receive", limits_.call);
  }

  absl::Status Check() override {
    if (communicator_ == nullptr) return absl::UnavailableError("NCCL: the pair was aborted");
    nccl::Result error = nccl::kSuccess;
    RWKV_RETURN_IF_ERROR(ToStatus(nccl_.comm_get_async_error(communicator_, &error), "check"));
    if (error == nccl::kInProgress) return absl::OkStatus();
    return ToStatus(error, sends_ ? "sending" : "receiving");
  }

  absl::Status End() override {
    if (communicator_ == nullptr) return absl::OkStatus();
    // NCCL's own waits have no limit: on a thread that may be left behind.
    struct Ended {
      absl::Notification done;
      nccl::Result result = nccl::kSuccess;
    };
    const auto ended = std::make_shared<Ended>();
    std::thread([ended, abort = nccl_.comm_abort, communicator = std::exchange(communicator_, nullptr)] {
      ended->result = abort(communicator);
      ended->done.Notify();
    }).detach();
    if (ended->done.WaitForNotificationWithTimeout(limits_.abort)) return ToStatus(ended->result, "abort");
    return absl::DeadlineExceededError(
        absl::StrCat("NCCL: the abort of a communicator hangs for ", absl::FormatDuration(limits_.abort)));
  }

 private:
  absl::Status ToStatus(nccl::Result result, absl::string_view what) const {
    return nccl::ToStatus(nccl_, result, what, communicator_);
  }

  nccl::Result One(float* memory, int64_t count, kernels::Stream& stream) {
    const auto size = static_cast<size_t>(count);
    return sends_ ? nccl_.send(memory, size, nccl::kFloat32, 1, communicator_, stream.handle())
                  : nccl_.recv(memory, size, nccl::kFloat32, 0, communicator_, stream.handle());
  }

  // The end of a call that returned `result`, which may be that it goes on.
  absl::Status Settle(nccl::Result result, absl::string_view what, absl::Duration limit) {
    const absl::Time begin = absl::Now();
    while (result == nccl::kInProgress) {
      if (stop_.HasBeenNotified()) return absl::UnavailableError(absl::StrCat("NCCL: ", what, ": aborted"));
      const absl::Duration waited = absl::Now() - begin;
      if (waited > limit) {
        return absl::UnavailableError(
            absl::StrCat("NCCL: ", what, ": the other stage did not come in ", absl::FormatDuration(limit)));
      }
      RWKV_RETURN_IF_ERROR(ToStatus(nccl_.comm_get_async_error(communicator_, &result), what));
      if (result != nccl::kInProgress) break;
      waited < kSpin ? std::this_thread::yield() : absl::SleepFor(kNap);
    }
    return ToStatus(result, what);
  }

  const nccl::Nccl& nccl_;
  const bool sends_;
  const LinkShape shape_;
  const NcclLimits limits_;
  const absl::Notification& stop_;
  nccl::Communicator communicator_ = nullptr;  // Null once ended.
};

class NcclLinks final : public DeviceLinks {
 public:
  NcclLinks(const nccl::Nccl& nccl, int version, std::string device, std::function<absl::Status()> bind,
            const NcclLimits& limits)
      : nccl_(nccl), version_(version), device_(std::move(device)), bind_(std::move(bind)), limits_(limits) {}

  absl::string_view kind() const override { return "nccl"; }
  int version() const override { return version_; }
  std::string device() const override { return device_; }

  absl::StatusOr<std::string> NewPairId() override {
    nccl::UniqueId id;
    RWKV_RETURN_IF_ERROR(nccl::ToStatus(nccl_, nccl_.get_unique_id(&id), "new id", nullptr));
    return std::string(id.internal, sizeof(id.internal));
  }

  absl::StatusOr<std::unique_ptr<DeviceRows>> Join(const std::string& id, bool sends, const LinkShape& shape,
                                                   const absl::Notification& stop) override {
    nccl::UniqueId unique;
    if (id.size() != sizeof(unique.internal)) {
      return absl::InvalidArgumentError(absl::StrCat("NCCL: an id of ", id.size(), " bytes"));
    }
    std::memcpy(unique.internal, id.data(), id.size());
    RWKV_RETURN_IF_ERROR(bind_());
    auto rows = std::make_unique<NcclRows>(nccl_, sends, shape, limits_, stop);
    RWKV_RETURN_IF_ERROR(rows->Init(unique));
    return absl::StatusOr<std::unique_ptr<DeviceRows>>(std::move(rows));
  }

 private:
  const nccl::Nccl& nccl_;
  const int version_;
  const std::string device_;
  const std::function<absl::Status()> bind_;
  const NcclLimits limits_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<DeviceLinks>> MakeNcclLinks(const nccl::Nccl& nccl, const std::string& device,
                                                           std::function<absl::Status()> bind,
                                                           const NcclLimits& limits) {
  int version = 0;
  RWKV_RETURN_IF_ERROR(nccl::ToStatus(nccl, nccl.get_version(&version), "version", nullptr));
  if (version < nccl::kOldestVersion) {
    return absl::UnimplementedError(absl::StrCat("NCCL: version ", version, " is older than ", nccl::kOldestVersion));
  }
  return std::make_unique<NcclLinks>(nccl, version, device, std::move(bind), limits);
}

}  // namespace rwkv::worker
