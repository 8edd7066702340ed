#include "services/worker/link/testing/fake_transfer.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace rwkv::worker::nccl::fake {

Fake& TheFake() {
  static auto* const fake = new Fake;
  return *fake;
}

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

Result Violate(Fake& fake, std::string what, Result result) {
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

namespace {

void Put(ncclComm& comm, const Message& message, const char* bytes = nullptr) {
  comm.outgoing.append(reinterpret_cast<const char*>(&message), sizeof(message));
  if (bytes != nullptr) comm.outgoing.append(bytes, message.bytes);
}

void Fail(ncclComm& comm, Result error) {
  if (comm.error == kSuccess) comm.error = error;
}

}  // namespace

void Close(ncclComm& comm) {
  for (int* fd : {&comm.fd, &comm.listener}) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
  }
}

namespace {

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

}  // namespace

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

}  // namespace rwkv::worker::nccl::fake
