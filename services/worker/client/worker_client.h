// What the router holds of a worker: one stage's Worker service behind an interface, so that the router is tested
// without one. fake_worker.h has a whole pipeline in memory.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "rwkv/v1/worker.pb.h"

namespace grpc {
class Channel;
}  // namespace grpc

namespace rwkv::worker {

// The stream that drives one stage for one epoch (worker.proto, Worker.Execute). One thread writes and one thread reads
// at a time, or nobody reads and somebody listens; Cancel and the destructor's owner may be any thread. Destroying it
// cancels it and waits for whoever listens, so that no `heard` destroys it.
class ExecuteStream {
 public:
  using Heard = std::function<void(absl::StatusOr<v1::ExecuteResponse>)>;

  virtual ~ExecuteStream() = default;

  // Sends the next command. Blocks while the worker takes no more (flow control). kUnavailable: the stream is over;
  // Read tells why.
  virtual absl::Status Write(const v1::ExecuteRequest& request) = 0;

  // Blocks until the next answer. The end of the stream is always an error, and stays the answer of every later Read:
  // kUnavailable (worker gone, drains, link broken, driven by another), kFailedPrecondition (stage plan), kCancelled
  // (Cancel).
  virtual absl::StatusOr<v1::ExecuteResponse> Read() = 0;

  // In place of Read, once: calls `heard` with what Read would say, one answer after the other, until and with the end.
  // Over a network the thread that waits for the connection calls it, so that nobody has to be woken for an answer:
  // `heard` must not block.
  virtual void Listen(Heard heard) = 0;

  // Ends the stream and with it the epoch; wakes Write and Read. May be called at any time, from any thread, more than
  // once.
  virtual void Cancel() = 0;
};

// One worker. Thread-safe.
class WorkerClient {
 public:
  virtual ~WorkerClient() = default;

  // kUnavailable: not reachable; kDeadlineExceeded: no answer until `deadline`.
  virtual absl::StatusOr<v1::DescribeResponse> Describe(absl::Time deadline) = 0;

  // The same, saying who asks. Calls `done` once, on any thread, maybe before it returns; until then the client lives,
  // and `done` does not end it. Once `done` is called nothing of the call holds the channel any more.
  // Of a client over a network it doesn't block; this one, for all others, asks Describe() and waits.
  using Described = std::function<void(absl::StatusOr<v1::DescribeResponse>)>;
  virtual void AskToDescribe(const v1::DescribeRequest& request, absl::Time deadline, Described done) {
    done(Describe(deadline));
  }

  // Never null; whether the worker can be reached shows at the first Write or Read. The stream may outlive the client.
  virtual std::unique_ptr<ExecuteStream> Execute() = 0;

  // "HOST:PORT", for OpenEpoch.next_address and for messages.
  virtual std::string address() const = 0;
};

// Over gRPC. `address` is the one `channel` was made for.
std::unique_ptr<WorkerClient> MakeWorkerClient(std::string address, std::shared_ptr<grpc::Channel> channel);

}  // namespace rwkv::worker
