// One Execute stream's commands on their way to the device's thread, and where its answers go.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "rwkv/v1/worker.pb.h"
#include "services/state_store/client/state_store_client.h"
#include "services/worker/engine/state_copy.h"
#include "services/worker/link/link.h"

namespace rwkv::worker {

// Where an epoch's answers go: the Execute stream. Any thread may call it; calls after End() do nothing.
class EpochSink {
 public:
  virtual ~EpochSink() = default;
  // May block while the router does not read, until End().
  virtual void Send(v1::ExecuteResponse response) = 0;
  // A refused TryPush may be tried again.
  virtual void OnRoom() = 0;
  // The epoch is over. Once, with an error. Must not block.
  virtual void End(const absl::Status& why) = 0;
};

// One Execute stream's commands, from OpenEpoch on. Thread-safe.
class Epoch {
 public:
  static constexpr size_t kMaxCommands = 256;  // Waiting.

  Epoch(v1::OpenEpoch open, std::shared_ptr<EpochSink> sink, std::unique_ptr<LinkReceiver> receiver,
        std::unique_ptr<LinkSender> sender, std::shared_ptr<state_store::RecordsClient> store);
  ~Epoch();

  const v1::OpenEpoch& open() const { return open_; }

  // Hands over the next command, or says no and leaves it: then the sink's OnRoom() will be called. True and dropped
  // when the epoch is over.
  bool TryPush(v1::ExecuteRequest& command) ABSL_LOCKS_EXCLUDED(mu_);

  // Ends the epoch; wakes the device's thread, both links and the sink. The first reason counts.
  void End(const absl::Status& why) ABSL_LOCKS_EXCLUDED(mu_);
  bool ended() const ABSL_LOCKS_EXCLUDED(mu_);
  // False: it lives on at `deadline`.
  bool WaitUntilEnded(absl::Time deadline) const ABSL_LOCKS_EXCLUDED(mu_);

 private:
  friend class StageRunner;

  // A snapshot that came, or did not, for the device's thread.
  struct Loaded {
    int slot = 0;
    uint64_t sequence = 0;
    absl::StatusOr<std::shared_ptr<StateCopy>> state;
  };
  struct Work {
    enum class Kind { kCommand, kLoaded, kDrawn, kOwnFrame };
    Kind kind = Kind::kCommand;
    v1::ExecuteRequest command;
    Loaded loaded;
    v1::StepResult drawn;
  };

  // Of links from device to device, else null. The device's thread's.
  DeviceRows* input_rows() const { return receiver_ == nullptr ? nullptr : receiver_->device_rows(); }
  DeviceRows* output_rows() const { return sender_ == nullptr ? nullptr : sender_->device_rows(); }

  // The next piece of work: what came from other stages and loaders before commands. False: the epoch is over, or there
  // is none until then (InfinitePast: now).
  bool Pop(absl::Time until, Work* work) ABSL_LOCKS_EXCLUDED(mu_);
  // The router's, by Pop() so far: every stage gets the same ones.
  uint64_t commands_taken() const ABSL_LOCKS_EXCLUDED(mu_);
  // From the links' threads: results of a step; a frame that comes, and is the first stage's own if it says after how
  // many commands. The device's thread has received the first of them.
  void PushDrawn(v1::StepResult drawn) ABSL_LOCKS_EXCLUDED(mu_);
  void PushFrame(absl::optional<uint64_t> own_after) ABSL_LOCKS_EXCLUDED(mu_);
  void TakeFrame() ABSL_LOCKS_EXCLUDED(mu_);
  // From a loader. Waits until the device's thread has taken it, so that a loader holds at most one state.
  void PushLoaded(Loaded loaded) ABSL_LOCKS_EXCLUDED(mu_);
  // The router's stream to this stage may be behind the one to the first, whose order counts.
  bool HasOwnFrame() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return !frames_.empty() && frames_.front().has_value() && *frames_.front() <= commands_taken_;
  }
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return !end_.ok() || !loaded_.empty() || !commands_.empty() || !drawn_.empty() || HasOwnFrame();
  }

  const v1::OpenEpoch open_;
  const std::shared_ptr<EpochSink> sink_;
  std::unique_ptr<LinkReceiver> receiver_;  // Null on the first stage.
  std::unique_ptr<LinkSender> sender_;      // Null on the last. Its thread calls PushDrawn().
  const std::shared_ptr<state_store::RecordsClient> store_;

  mutable absl::Mutex mu_;
  absl::Status end_ ABSL_GUARDED_BY(mu_);  // OK while it lives.
  bool wants_room_ ABSL_GUARDED_BY(mu_) = false;
  std::deque<v1::ExecuteRequest> commands_ ABSL_GUARDED_BY(mu_);
  uint64_t commands_taken_ ABSL_GUARDED_BY(mu_) = 0;
  std::deque<Loaded> loaded_ ABSL_GUARDED_BY(mu_);
  // Both as bounded as the steps that are under way.
  std::deque<v1::StepResult> drawn_ ABSL_GUARDED_BY(mu_);
  std::deque<absl::optional<uint64_t>> frames_ ABSL_GUARDED_BY(mu_);
};

}  // namespace rwkv::worker
