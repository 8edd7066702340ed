// Where the messages of a call go. Implemented by rpc/ over gRPC, and by tests.
#pragma once

#include <cstddef>
#include <functional>

#include "absl/status/status.h"

namespace rwkv::router {

// Thread-safe; no call blocks. Its owner drops it after Close().
template <typename Response>
class ResponseStream {
 public:
  virtual ~ResponseStream() = default;

  // Queues a message. The sender keeps the queue short by queued() and OnRoom().
  virtual void Send(Response response) = 0;

  // Messages that the transport has not taken yet.
  virtual size_t queued() const = 0;

  // Calls `on_room` once, from any thread, as soon as the queue is at most half of what it is now (at once if it is
  // empty).
  virtual void OnRoom(std::function<void()> on_room) = 0;

  // The end of the call, after what is queued. OK or the error that the client gets.
  virtual void Close(absl::Status status) = 0;
};

}  // namespace rwkv::router
