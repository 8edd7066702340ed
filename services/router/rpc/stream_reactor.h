// The answering side of a call over gRPC's callback API as a ResponseStream: no thread a call, a queue that the sender
// bounds.
#pragma once

#include <grpcpp/support/server_callback.h>

#include <deque>
#include <functional>
#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "services/common/grpc_status.h"
#include "services/router/core/response_stream.h"

namespace rwkv::router {

// Wire is what gRPC writes: Response itself, or a ByteBuffer of it; Base is gRPC's reactor, which may also read.
// Deletes itself when the call is over.
template <typename Response, typename Wire, typename Base = grpc::ServerWriteReactor<Wire>>
class StreamReactor : public Base {
 public:
  // Outlives the reactor for as long as anybody sends into it.
  class Stream final : public ResponseStream<Response> {
   public:
    using Encode = std::function<Wire(const Response&)>;
    Stream(StreamReactor* reactor, Encode encode) : encode_(std::move(encode)), reactor_(reactor) {}

    void Send(Response response) override ABSL_LOCKS_EXCLUDED(mu_) {
      Wire wire = encode_(response);
      absl::MutexLock lock(&mu_);
      if (closed_ || broken_ || reactor_ == nullptr) return;
      queue_.push_back(std::move(wire));
      WriteNext();
    }

    size_t queued() const override ABSL_LOCKS_EXCLUDED(mu_) {
      absl::MutexLock lock(&mu_);
      return queue_.size() + (writing_ ? 1 : 0);
    }

    void OnRoom(std::function<void()> on_room) override ABSL_LOCKS_EXCLUDED(mu_) {
      {
        absl::MutexLock lock(&mu_);
        const size_t queued = queue_.size() + (writing_ ? 1 : 0);
        if (queued > 0 && !broken_ && reactor_ != nullptr) {
          on_room_ = std::move(on_room);
          room_at_ = queued / 2;
          return;
        }
      }
      on_room();
    }

    void Close(absl::Status status) override ABSL_LOCKS_EXCLUDED(mu_) {
      absl::MutexLock lock(&mu_);
      if (closed_) return;
      closed_ = true;
      status_ = std::move(status);
      if (!status_.ok()) queue_.clear();  // The error is news; what waits can be asked for again.
      WriteNext();
    }

   private:
    friend class StreamReactor;

    // Starts the next operation on the call, of which there is one at a time.
    void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      if (reactor_ == nullptr || writing_ || finishing_) return;
      if (!queue_.empty()) {
        writing_ = true;
        current_ = std::move(queue_.front());
        queue_.pop_front();
        // What more is there goes along with it.
        grpc::WriteOptions options;
        if (!queue_.empty()) options.set_buffer_hint();
        reactor_->StartWrite(&current_, options);
      } else if (closed_) {
        finishing_ = true;
        reactor_->Finish(common::ToGrpcStatus(status_));
      }
    }

    void Written(bool ok) ABSL_LOCKS_EXCLUDED(mu_) {
      std::function<void()> on_room;
      {
        absl::MutexLock lock(&mu_);
        writing_ = false;
        current_ = Wire();
        if (!ok) {  // The client is gone; whoever sends hears of it by OnCancel.
          broken_ = true;
          queue_.clear();
        }
        WriteNext();
        if (queue_.size() + (writing_ ? 1 : 0) <= room_at_) on_room = std::exchange(on_room_, nullptr);
      }
      if (on_room) on_room();
    }

    void Gone() ABSL_LOCKS_EXCLUDED(mu_) {
      std::function<void()> on_room;
      {
        absl::MutexLock lock(&mu_);
        reactor_ = nullptr;
        queue_.clear();
        on_room = std::exchange(on_room_, nullptr);
      }
      if (on_room) on_room();
    }

    const Encode encode_;
    mutable absl::Mutex mu_;
    StreamReactor* reactor_ ABSL_GUARDED_BY(mu_);  // Null once the call is over.
    std::deque<Wire> queue_ ABSL_GUARDED_BY(mu_);
    Wire current_ ABSL_GUARDED_BY(mu_);  // gRPC reads it while writing_.
    bool writing_ ABSL_GUARDED_BY(mu_) = false;
    bool closed_ ABSL_GUARDED_BY(mu_) = false;
    bool finishing_ ABSL_GUARDED_BY(mu_) = false;
    bool broken_ ABSL_GUARDED_BY(mu_) = false;
    absl::Status status_ ABSL_GUARDED_BY(mu_);
    std::function<void()> on_room_ ABSL_GUARDED_BY(mu_);
    size_t room_at_ ABSL_GUARDED_BY(mu_) = 0;
  };

  // `on_cancel` is called at most once, when the client is gone or its deadline has passed; also for a call that has
  // ended well a moment ago.
  StreamReactor(typename Stream::Encode encode, std::function<void()> on_cancel)
      : stream_(std::make_shared<Stream>(this, std::move(encode))), on_cancel_(std::move(on_cancel)) {}

  std::shared_ptr<Stream> stream() const { return stream_; }

  void OnWriteDone(bool ok) override { stream_->Written(ok); }
  void OnCancel() override { on_cancel_(); }
  void OnDone() override {
    stream_->Gone();
    delete this;
  }

 private:
  const std::shared_ptr<Stream> stream_;
  const std::function<void()> on_cancel_;
};

}  // namespace rwkv::router
