#include "services/worker/link/testing/fake_nccl.h"

#include <unistd.h>

#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "kernels/cuda/testing/fake_runtime.h"
#include "services/worker/link/testing/fake_transfer.h"

namespace rwkv::worker::nccl {
using namespace fake;  // NOLINT: its other half.
namespace {

namespace cuda = ::rwkv::kernels::cuda;

// The group of the calling thread.
struct Group {
  int depth = 0;
  ncclComm* communicator = nullptr;
  std::vector<Part> parts;
};
thread_local Group group;

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
  absl::MutexLock lock(&fake.mu);
  const int64_t resets = fake.resets;
  const auto goes_on = [&] { return !fake.faults.abort_hangs || fake.resets != resets; };
  fake.mu.Await(absl::Condition(&goes_on));
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
