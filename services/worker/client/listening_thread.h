// ExecuteStream::Listen() of streams that are only read.
#pragma once

#include <thread>
#include <utility>

#include "absl/status/statusor.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/client/worker_client.h"

namespace rwkv::worker {

// A member of the stream that its destructor ends: Join() after Cancel().
class ListeningThread {
 public:
  ~ListeningThread() { Join(); }

  void Start(ExecuteStream* stream, ExecuteStream::Heard heard) {
    thread_ = std::thread([stream, heard = std::move(heard)] {
      bool over = false;
      while (!over) {
        absl::StatusOr<v1::ExecuteResponse> response = stream->Read();
        over = !response.ok();
        heard(std::move(response));
      }
    });
  }
  void Join() {
    if (thread_.joinable()) thread_.join();
  }

 private:
  std::thread thread_;
};

}  // namespace rwkv::worker
