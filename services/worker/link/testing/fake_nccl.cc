#include "services/worker/link/testing/fake_nccl.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "kernels/cuda/testing/fake_runtime.h"

namespace rwkv::worker::nccl {
namespace {

namespace cuda = ::rwkv::kernels::cuda;

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

// Where a process waits for the other one. Of rank 0 only.
std::string SocketName(const UniqueId& id) { return std::string(id.internal, strnlen(id.internal, 100)); }

int OpenSocket(const std::string& name, bool listens) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, name.data(), name.size());  // Abstract: leaves no file behind.
  const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  auto* const to = reinterpret_cast<sockaddr*>(&address);
  const int error = listens ? (bind(fd, to, size) != 0 || listen(fd, 1) != 0) : connect(fd, to, size);
  if (error == 0) return fd;
  close(fd);
  return -1;
}

}  // namespace

struct ncclComm {
  Phase phase = Phase::kMeeting;
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
  std::deque<std::pair<Message, std::string>> data;  // Arrived and not taken.
  uint64_t transfers = 0;                            // Begun.
  uint64_t taken = 0;                                // By the other end.
  // A group that was ended and is not yet in its stream.
  std::vector<Part> pending;
  bool first_sent = false;
};

namespace {

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

Fake& TheFake() {
  static auto* const fake = new Fake;
  return *fake;
}

// The group of the calling thread.
struct Group {
  int depth = 0;
  ncclComm* communicator = nullptr;
  std::vector<Part> parts;
};
thread_local Group group;

// All below with the lock held.

Result Violate(Fake& fake, std::string what, Result result = kInvalidUsage) {
  fake.violations.push_back(std::move(what));
  return result;
}

std::shared_ptr<ncclComm> Find(Fake& fake, ncclComm* handle, const char* what) {
  const auto it = fake.live.find(handle);
  if (it == fake.live.end()) {
    Violate(fake, absl::StrCat(what, fake.gone.count(handle) > 0 ? " after abort" : " of what is no communicator"));
    return nullptr;
  }
  if (it->second->thread != std::this_thread::get_id()) Violate(fake, absl::StrCat(what, " from a second thread"));
  return it->second;
}

void Put(ncclComm& comm, const Message& message, const char* bytes = nullptr) {
  comm.outgoing.append(reinterpret_cast<const char*>(&message), sizeof(message));
  if (bytes != nullptr) comm.outgoing.append(bytes, message.bytes);
}

void Fail(ncclComm& comm, Result error) {
  if (comm.error == kSuccess) comm.error = error;
}

void Close(ncclComm& comm) {
  for (int* fd : {&comm.fd, &comm.listener}) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
  }
}

// Whatever the socket takes and gives at once.
void Pump(Fake& fake, ncclComm& comm) {
  if (comm.fd < 0) return;
  while (!comm.outgoing.empty()) {
    const ssize_t sent = send(comm.fd, comm.outgoing.data(), comm.outgoing.size(), MSG_NOSIGNAL);
    if (sent < 0 && errno == EAGAIN) break;
    if (sent <= 0) return Fail(comm, kRemoteError);
    comm.outgoing.erase(0, static_cast<size_t>(sent));
  }
  char buffer[1 << 16];
  for (;;) {
    const ssize_t got = recv(comm.fd, buffer, sizeof(buffer), 0);
    if (got < 0 && errno == EAGAIN) break;
    if (got <= 0) {
      Fail(comm, kRemoteError);
      break;
    }
    comm.incoming.append(buffer, static_cast<size_t>(got));
  }
  Message message;
  while (comm.incoming.size() >= sizeof(message)) {
    std::memcpy(&message, comm.incoming.data(), sizeof(message));
    const size_t whole = sizeof(message) + (message.type == Message::kData ? message.bytes : 0);
    if (comm.incoming.size() < whole) break;
    switch (message.type) {
      case Message::kReady:
        comm.peer_ready = true;
        if (message.version != fake.faults.version) {
          Violate(fake,
                  absl::StrCat("versions ", message.version, " and ", fake.faults.version, " in one communicator"));
        }
        break;
      case Message::kFirst:
        comm.peer_first = true;
        break;
      case Message::kTaken:
        ++comm.taken;
        break;
      case Message::kData:
        comm.data.emplace_back(message, comm.incoming.substr(sizeof(message), message.bytes));
        break;
    }
    comm.incoming.erase(0, whole);
  }
}

void Meet(Fake& fake, ncclComm& comm) {
  if (fake.faults.never_ready) return;
  if (comm.fd < 0) {
    comm.fd = comm.rank == 0 ? accept4(comm.listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC)
                             : OpenSocket(comm.name, false);
    if (comm.fd < 0) return;
    Message ready;
    ready.version = fake.faults.version;
    Put(comm, ready);
  }
  Pump(fake, comm);
  // A few questions more than needed: whoever does not ask on meets it here.
  if (comm.peer_ready && ++comm.questions > 2) comm.phase = Phase::kReady;
}

// A group's turn in its stream has come, again and again until it says true.
class Transfer {
 public:
  Transfer(std::shared_ptr<ncclComm> comm, std::vector<Part> parts, uint64_t number, int64_t count)
      : comm_(std::move(comm)), parts_(std::move(parts)), number_(number), count_(count) {}

  bool operator()() {
    Fake& fake = TheFake();
    absl::MutexLock lock(&fake.mu);
    if (comm_->phase == Phase::kAborted) return true;
    if (count_ == fake.faults.die_at) raise(SIGKILL);
    if (count_ == fake.faults.fail_at) Fail(*comm_, kInternalError);
    if (count_ == fake.faults.hang_at || comm_->error != kSuccess) return false;
    if (!begun_) Begin();
    Pump(fake, *comm_);
    if (absl::Now() < not_before_) return false;
    const bool done = parts_[0].sends ? Sent(fake) : Received(fake);
    if (done) {
      ++fake.ended;
      Pump(fake, *comm_);  // Says so to the other end.
    }
    return done;
  }

 private:
  void Begin() {
    begun_ = true;
    not_before_ = absl::Now() + TheFake().faults.slow;
    for (size_t i = 0; i < parts_.size(); ++i) {
      if (!parts_[i].sends) {
        std::memset(parts_[i].memory, 0xff, parts_[i].bytes);
        continue;
      }
      Message message;
      message.type = Message::kData;
      message.transfer = number_;
      message.part = static_cast<uint32_t>(i);
      message.parts = static_cast<uint32_t>(parts_.size());
      message.bytes = parts_[i].bytes;
      Put(*comm_, message, parts_[i].memory);
      sent_.emplace_back(parts_[i].memory, parts_[i].bytes);
    }
  }

  bool Sent(Fake& fake) {
    if (comm_->taken <= number_) return false;
    for (size_t i = 0; i < parts_.size(); ++i) {
      if (std::memcmp(sent_[i].data(), parts_[i].memory, parts_[i].bytes) != 0) {
        Violate(fake, absl::StrCat("the buffer of transfer ", number_, " was written before it was sent"));
      }
    }
    return true;
  }

  bool Received(Fake& fake) {
    if (comm_->data.size() < parts_.size() && !IsWhole()) return false;
    if (comm_->data.front().first.parts != parts_.size()) {
      Violate(fake, absl::StrCat("a group of ", comm_->data.front().first.parts, " meets one of ", parts_.size()));
      Fail(*comm_, kInternalError);
      return false;
    }
    for (const Part& part : parts_) {
      const auto [message, bytes] = std::move(comm_->data.front());
      comm_->data.pop_front();
      if (bytes.size() != part.bytes) {
        Violate(fake, absl::StrCat(bytes.size(), " bytes are sent and ", part.bytes, " received"));
        Fail(*comm_, kInternalError);
        return false;
      }
      std::memcpy(part.memory, bytes.data(), bytes.size());
    }
    Message taken;
    taken.type = Message::kTaken;
    taken.transfer = number_;
    Put(*comm_, taken);
    return true;
  }

  // Whether the other end's group is there, however many parts it has.
  bool IsWhole() const { return !comm_->data.empty() && comm_->data.size() >= comm_->data.front().first.parts; }

  const std::shared_ptr<ncclComm> comm_;
  const std::vector<Part> parts_;
  const uint64_t number_;
  const int64_t count_;
  bool begun_ = false;
  absl::Time not_before_;
  std::vector<std::string> sent_;
};

// What GetAsyncError moves, and then says. `enqueue` is a task to put into the stream once the lock is gone.
Result Progress(Fake& fake, const std::shared_ptr<ncclComm>& comm, std::function<bool()>* enqueue,
                StreamHandle* stream) {
  if (comm->phase == Phase::kMeeting) Meet(fake, *comm);
  Pump(fake, *comm);
  if (comm->error != kSuccess) return comm->error;
  if (comm->phase == Phase::kMeeting) return kInProgress;
  if (comm->pending.empty()) return kSuccess;
  if (!comm->first_sent) {
    comm->first_sent = true;
    Message first;
    first.type = Message::kFirst;
    Put(*comm, first);
    Pump(fake, *comm);
    return kInProgress;
  }
  if (!comm->peer_first) return kInProgress;
  *stream = comm->pending.front().stream;
  // std::function wants to copy; the parts that are sent are read only once it runs.
  const auto transfer = std::make_shared<Transfer>(comm, std::move(comm->pending), comm->transfers++, fake.begun++);
  comm->pending.clear();
  *enqueue = [transfer] { return (*transfer)(); };
  return kSuccess;
}

Result GetVersion(int* version) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  *version = fake.faults.version;
  return kSuccess;
}

Result GetUniqueId(UniqueId* id) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  std::memset(id->internal, 0, sizeof(id->internal));
  const std::string name =
      absl::StrCat("rwkv-fake-nccl-", getpid(), "-", absl::ToUnixNanos(absl::Now()), "-", ++fake.ids);
  std::memcpy(id->internal, name.data(), name.size());
  return kSuccess;
}

Result CommInitRankConfig(Communicator* communicator, int ranks, UniqueId id, int rank, Config* config) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  *communicator = nullptr;
  if (config == nullptr || config->magic != Config().magic || config->size < sizeof(Config)) {
    return Violate(fake, "init without a configuration", kInvalidArgument);
  }
  if (config->blocking != 0) return Violate(fake, "init of a communicator whose calls block", kInvalidArgument);
  if (ranks != 2 || rank < 0 || rank > 1) {
    return Violate(fake, absl::StrCat("init of rank ", rank, " of ", ranks, ", not of a pair"), kInvalidArgument);
  }
  auto comm = std::make_shared<ncclComm>();
  comm->rank = rank;
  comm->name = SocketName(id);
  comm->thread = std::this_thread::get_id();
  if (rank == 0) {
    comm->listener = OpenSocket(comm->name, true);
    if (comm->listener < 0) return Violate(fake, "an id is used twice", kInvalidArgument);
  }
  *communicator = comm.get();
  fake.live[comm.get()] = std::move(comm);
  return kInProgress;
}

Result CommGetAsyncError(Communicator communicator, Result* error) {
  std::function<bool()> task;
  StreamHandle stream = nullptr;
  {
    Fake& fake = TheFake();
    absl::MutexLock lock(&fake.mu);
    const std::shared_ptr<ncclComm> comm = Find(fake, communicator, "a question");
    if (comm == nullptr) return kInvalidArgument;
    *error = Progress(fake, comm, &task, &stream);
  }
  if (task != nullptr && cuda::EnqueueOnFake(stream, std::move(task)) != 0) *error = kUnhandledCudaError;
  return kSuccess;
}

Result CommAbort(Communicator communicator) {
  Fake& fake = TheFake();
  const int64_t resets = fake.resets;
  for (;;) {
    {
      absl::MutexLock lock(&fake.mu);
      if (!fake.faults.abort_hangs || fake.resets != resets) break;
    }
    absl::SleepFor(absl::Milliseconds(1));
  }
  absl::MutexLock lock(&fake.mu);
  const auto it = fake.live.find(communicator);
  if (it == fake.live.end()) {
    return Violate(fake, fake.gone.count(communicator) > 0 ? "abort after abort" : "abort of what is no communicator",
                   kInvalidArgument);
  }
  it->second->phase = Phase::kAborted;
  Close(*it->second);
  fake.gone[communicator] = it->second;
  fake.live.erase(it);
  return kSuccess;
}

Result GroupStart() {
  ++group.depth;
  return kSuccess;
}

Result GroupEnd() {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  if (group.depth == 0) return Violate(fake, "the end of a group that nobody began");
  if (--group.depth > 0) return kSuccess;
  const Group ended = std::exchange(group, Group());
  if (ended.communicator == nullptr) return kSuccess;
  const std::shared_ptr<ncclComm> comm = Find(fake, ended.communicator, "the end of a group");
  if (comm == nullptr) return kInvalidArgument;
  if (!comm->pending.empty()) return Violate(fake, "a group behind one that NCCL has not taken yet");
  comm->pending = ended.parts;
  return kInProgress;
}

Result Add(const char* what, bool sends, void* memory, size_t count, int type, int peer, Communicator communicator,
           StreamHandle stream) {
  const auto bytes = static_cast<int64_t>(count * sizeof(float));
  const bool on_device = cuda::IsDeviceMemoryOfFake(memory, bytes);
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  const std::shared_ptr<ncclComm> comm = Find(fake, communicator, what);
  if (comm == nullptr) return kInvalidArgument;
  if (comm->error != kSuccess) return comm->error;
  if (comm->phase != Phase::kReady) return Violate(fake, absl::StrCat(what, " before the communicator is ready"));
  if (!on_device) return Violate(fake, absl::StrCat(what, " of ", bytes, " bytes that are not the device's"));
  if (type != kFloat32 || peer != 1 - comm->rank || count == 0) {
    return Violate(fake, absl::StrCat(what, " of ", count, " x type ", type, " with ", peer), kInvalidArgument);
  }
  if (group.depth == 0) return Violate(fake, absl::StrCat(what, " outside a group"));
  if (group.communicator != nullptr && group.communicator != communicator) {
    return Violate(fake, "two communicators in a group");
  }
  group.communicator = communicator;
  group.parts.push_back({sends, static_cast<char*>(memory), static_cast<size_t>(bytes), stream});
  if (group.parts[0].stream != stream || group.parts[0].sends != sends) return Violate(fake, "a group of two kinds");
  return kSuccess;
}

Result Send(const void* buffer, size_t count, int type, int peer, Communicator communicator, StreamHandle stream) {
  return Add("send", true, const_cast<void*>(buffer), count, type, peer, communicator, stream);
}

Result Recv(void* buffer, size_t count, int type, int peer, Communicator communicator, StreamHandle stream) {
  return Add("receive", false, buffer, count, type, peer, communicator, stream);
}

const char* GetErrorString(Result result) {
  switch (result) {
    case kSuccess:
      return "no error";
    case kRemoteError:
      return "remote process exited or there was a network error";
    case kInternalError:
      return "internal error";
    case kInvalidArgument:
      return "invalid argument";
    case kInvalidUsage:
      return "invalid usage";
    case kInProgress:
      return "NCCL operation in progress";
    default:
      return "another error";
  }
}

const char* GetLastError(Communicator) { return "said by the fake"; }

}  // namespace

const Nccl kFakeNccl = {GetVersion, GetUniqueId, CommInitRankConfig, CommGetAsyncError, CommAbort, GroupStart, GroupEnd,
                        Send,       Recv,        GetErrorString,     GetLastError};

absl::StatusOr<FakeFaults> ParseFakeFaults(absl::string_view text) {
  FakeFaults faults;
  for (absl::string_view part : absl::StrSplit(text, ',', absl::SkipEmpty())) {
    const std::pair<absl::string_view, absl::string_view> fault = absl::StrSplit(part, absl::MaxSplits('=', 1));
    const auto& [name, value] = fault;
    const bool ok = name == "version"       ? absl::SimpleAtoi(value, &faults.version)
                    : name == "never_ready" ? absl::SimpleAtob(value, &faults.never_ready)
                    : name == "abort_hangs" ? absl::SimpleAtob(value, &faults.abort_hangs)
                    : name == "hang_at"     ? absl::SimpleAtoi(value, &faults.hang_at)
                    : name == "fail_at"     ? absl::SimpleAtoi(value, &faults.fail_at)
                    : name == "die_at"      ? absl::SimpleAtoi(value, &faults.die_at)
                    : name == "slow"        ? absl::ParseDuration(value, &faults.slow)
                                            : false;
    if (!ok) return absl::InvalidArgumentError(absl::StrCat("\"", part, "\" is no fault of the fake NCCL"));
  }
  return faults;
}

void ResetFake(const FakeFaults& faults) {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  fake.faults = faults;
  fake.violations.clear();
  fake.begun = 0;
  fake.ended = 0;
  ++fake.resets;
}

int64_t TransfersOfFake() {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  return fake.ended;
}

int CommunicatorsOfFake() {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  return static_cast<int>(fake.live.size());
}

std::vector<std::string> ViolationsOfFake() {
  Fake& fake = TheFake();
  absl::MutexLock lock(&fake.mu);
  return fake.violations;
}

}  // namespace rwkv::worker::nccl
