// The fake NCCL's communicators: two sockets, and transfers that are work of a stream. All of it with the fake's lock
// held, but for what a stream runs.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "services/worker/link/testing/fake_nccl.h"

namespace rwkv::worker::nccl {
namespace fake {

// What goes over the socket, in front of `bytes` of rows.
struct Message {
  enum Type : uint32_t { kReady, kFirst, kData, kTaken } type = kReady;
  int32_t version = 0;    // kReady
  uint64_t transfer = 0;  // kData, kTaken: of this communicator, from 0
  uint32_t part = 0;      // of the group
  uint32_t parts = 0;
  uint64_t bytes = 0;
};

struct Part {
  bool sends = false;
  char* memory = nullptr;
  size_t bytes = 0;
  StreamHandle stream = nullptr;
};

enum class Phase { kMeeting, kReady, kFailed, kAborted };

}  // namespace fake

struct ncclComm {
  fake::Phase phase = fake::Phase::kMeeting;
  Result error = kSuccess;
  int rank = 0;
  std::string name;
  std::thread::id thread;  // Whose it is.
  int listener = -1;
  int fd = -1;
  bool peer_ready = false;
  bool peer_first = false;
  int questions = 0;
  std::string incoming, outgoing;
  std::deque<std::pair<fake::Message, std::string>> data;  // Arrived and not taken.
  uint64_t transfers = 0;                                  // Begun.
  uint64_t taken = 0;                                      // By the other end.
  // A group that was ended and is not yet in its stream.
  std::vector<fake::Part> pending;
  bool first_sent = false;
};

namespace fake {

struct Fake {
  absl::Mutex mu;
  FakeFaults faults;
  std::vector<std::string> violations;
  int64_t begun = 0;
  int64_t ended = 0;
  int64_t ids = 0;
  std::atomic<int64_t> resets{0};
  std::map<ncclComm*, std::shared_ptr<ncclComm>> live;
  std::map<ncclComm*, std::shared_ptr<ncclComm>> gone;  // Kept, so that whoever uses one still is seen.
};

Fake& TheFake();

Result Violate(Fake& fake, std::string what, Result result = kInvalidUsage);
std::shared_ptr<ncclComm> Find(Fake& fake, ncclComm* handle, const char* what);

// Where a process waits for the other one. Of rank 0 only.
std::string SocketName(const UniqueId& id);
// -1: not yet.
int OpenSocket(const std::string& name, bool listens);
void Close(ncclComm& comm);

// What GetAsyncError moves, and then says. `enqueue` is a task to put into the stream once the lock is gone.
Result Progress(Fake& fake, const std::shared_ptr<ncclComm>& comm, std::function<bool()>* enqueue,
                StreamHandle* stream);

}  // namespace fake
}  // namespace rwkv::worker::nccl
