// What joins a pipeline stage to the next, for one epoch.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/optional.h"
#include "kernels/base/stream.h"
#include "rwkv/v1/worker.pb.h"

namespace rwkv::worker {

// An entry of a step that some stage refused; later stages skip it.
struct RefusedEntry {
  int32_t entry = 0;
  absl::Status status;  // Never OK.
};

// Small: what the next stage must know of a step before the activations are there. Rows of refused entries stay as
// padding, so their number follows from the step alone.
struct LinkHeader {
  uint64_t step_id = 0;
  int64_t rows = 0;                   // >= 0
  std::vector<RefusedEntry> refused;  // Ascending by entry.
  // A step of the first stage's own, after so many of the router's commands. Without entries: the router's next step.
  v1::Step own_step{};
  uint64_t commands_before = 0;

  bool is_own() const { return own_step.entries_size() > 0; }
};

// One end of what moves rows from device to device, as work of a stream. For the thread that sends or receives.
class DeviceRows {
 public:
  virtual ~DeviceRows() = default;

  // Enqueues that the rows (>= 1) of the next frame move, from or into `x` [rows, D] and `v_first` [rows,
  // v_first_width] of the device's memory. The stream keeps the order: what is enqueued behind finds them moved, and may
  // use the memory again. May wait for the other end's call, within a limit. kUnavailable: the pair is broken.
  virtual absl::Status Move(int64_t rows, float* x, float* v_first, kernels::Stream& stream) = 0;

  // OK while what was enqueued can still come to its end.
  virtual absl::Status Check() = 0;

  // Ends the pair: what has not moved never will, and streams go on. kDeadlineExceeded: they do not; the process must
  // end.
  virtual absl::Status End() = 0;
};

// The activations of one step. They lie in pinned host memory of whoever sends or receives, with room for max_rows, or
// stay in the device's, from where `rows` moves them.
struct LinkFrame {
  LinkHeader header;
  float* x = nullptr;          // [rows, D], residual stream
  float* v_first = nullptr;    // [rows, v_first_width], layer 0's value
  DeviceRows* rows = nullptr;  // Not null: `x` and `v_first` are not used. Of the link.
};

// What frames of a model look like; both ends agree on it.
struct LinkShape {
  int64_t width = 0;          // D
  int64_t v_first_width = 0;  // 0: none
  int64_t max_rows = 0;
};

// kInvalidArgument naming the values: a header that is not of step `expected_step`, or of too many rows, or whose
// refusals are none.
absl::Status CheckHeader(const LinkHeader& header, const LinkShape& shape, uint64_t expected_step);

// The upstream end. One thread connects and sends; any may abort. It learns of a break when it sends.
class LinkSender {
 public:
  using Drawn = std::function<void(v1::StepResult)>;

  virtual ~LinkSender() = default;

  // `drawn` gets what the other end returns, in order, on a thread of the link's that ends with this object. To be set
  // once, before Connect().
  virtual void NotifyDrawn(Drawn drawn) = 0;

  // Waits until the next stage's worker has the epoch open, within a limit of the implementation's. kUnavailable: it
  // has not, or is not there. kFailedPrecondition: the two stages do not fit.
  virtual absl::Status Connect() = 0;

  // After Connect(): if not null, frames that are sent are headers, and this moves their rows. Sent first, so that the
  // other end knows what comes.
  virtual DeviceRows* device_rows() { return nullptr; }

  // In step order. Blocks while too many frames are under way; the frame's memory is the caller's again when it
  // returns. kUnavailable: the link is broken or aborted, for good.
  virtual absl::Status Send(const LinkFrame& frame) = 0;

  // Ends the link: Connect, Send and the other end's Receive return at once.
  virtual void Abort() = 0;
};

// The downstream end. One thread receives; any may abort.
class LinkReceiver {
 public:
  using Coming = std::function<void(absl::optional<uint64_t> own_after)>;

  virtual ~LinkReceiver() = default;

  // Waits until the stage before is connected and both know how rows move. At once where there is nothing to agree on.
  // kUnavailable: it did not come, or the link is broken.
  virtual absl::Status Join() { return absl::OkStatus(); }

  // After Join(): if not null, Receive() gives headers, and this moves their rows.
  virtual DeviceRows* device_rows() { return nullptr; }

  // The next frame, checked: its header, and its rows in the memory that `frame` points to. Blocks. kUnavailable: the
  // link is broken or aborted, for good. kInvalidArgument: the peer sent a frame that is out of order or of wrong
  // sizes.
  virtual absl::Status Receive(LinkFrame& frame) = 0;

  // Whether Receive would return at once.
  virtual bool Ready() = 0;

  // `coming` is called for each frame, by one thread and in order, before Receive can give it: so that a stage can wait
  // for frames and commands alike. Of the first stage's own it gets their commands_before. To be set once, before the
  // first.
  virtual void NotifyFrames(Coming coming) = 0;

  // Hands back what was drawn. By one thread, which may be another than the receiver's; may block while the other end
  // does not read. kUnavailable: the link is broken or aborted.
  virtual absl::Status Return(const v1::StepResult& drawn) = 0;

  // `broken` is called once, from any thread, when the other end leaves or breaks the link, so that an idle stage
  // knows, too; at once if that has happened. Not for our own Abort. To be set once.
  virtual void NotifyBroken(std::function<void(const absl::Status&)> broken) = 0;

  // Ends the link: Receive and the other end's Send return at once.
  virtual void Abort() = 0;
};

// Makes both ends of a worker's links. Thread-safe; outlives them.
class LinkTransport {
 public:
  virtual ~LinkTransport() = default;

  // From now on the stage before may connect for `epoch`; until the receiver is destroyed.
  virtual std::unique_ptr<LinkReceiver> Accept(const std::string& epoch) = 0;

  // No I/O before Connect().
  virtual std::unique_ptr<LinkSender> Dial(const std::string& address, const std::string& epoch) = 0;
};

}  // namespace rwkv::worker
