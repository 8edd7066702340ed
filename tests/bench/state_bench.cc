// state_bench: how fast states go to a store and come back, beside what the machine's memory and disk do. A JSON line a
// case, times in seconds of each state:
//   state_bench copy SHAPE COUNT                    {"case": "copy", ...}
//   state_bench save ADDRESS SHAPE COUNT FOLDER     {"case": "save" | "disk write" | "disk write, direct", ...}
//   state_bench restore ADDRESS SHAPE COUNT FOLDER  {"case": "restore" | "disk read", ...}  of what `save` has saved
//   state_bench restore ADDRESS SHAPE COUNT         {"case": "restore", ...}
// and with each of the last three {"case": "save, 4 at once" | "restore, 4 at once", ...}: as many states by four
// threads, seconds a state.
// `save` makes COUNT snapshots, each of a session of its own, `restore` compares them byte by byte. In turns with them
// as many bytes are written to FOLDER, on the store's disk, through the page cache and past it (direct) and made
// durable, and read past it: what else uses the disk changes its speed by the second. What `save` writes there,
// `restore` reads and removes.
// A save begins with the copy out of the slot and ends when the store has committed the manifest; a restore begins with
// the question for the snapshot and ends with the copy into the slot. Between are the worker's own transfer and the
// store's client. States are random, of the published RWKV-7 shapes 0.1b, 1.5b and 7.2b.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <future>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "kernels/base/status_macros.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/common/channel.h"
#include "services/common/memory.h"
#include "services/common/metrics.h"
#include "services/state_store/client/state_store_client.h"
#include "services/worker/engine/snapshot_transfer.h"
#include "services/worker/engine/worker_metrics.h"

namespace rwkv {
namespace {

constexpr absl::Duration kLimit = absl::Seconds(60);
constexpr char kFingerprint[] = "00000000000000000000000000000bec";
constexpr int kAtOnce = 4;
constexpr size_t kBlock = 1 << 20;  // Of reads and writes of the disk alone.

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
absl::Time Deadline() { return absl::Now() + kLimit; }

struct Shape {
  std::string name;
  size_t layers = 0;
  size_t heads = 0;
  // Of a layer: a wkv state [H, 64, 64] and two shift states [H * 64], fp32.
  size_t record_bytes() const { return (heads * 64 * 64 + 2 * heads * 64) * sizeof(float); }
  size_t bytes() const { return layers * record_bytes(); }
};

absl::StatusOr<Shape> FindShape(const std::string& name) {
  for (const Shape& shape : {Shape{"0.1b", 12, 12}, Shape{"1.5b", 24, 32}, Shape{"7.2b", 32, 64}}) {
    if (shape.name == name) return shape;
  }
  return absl::InvalidArgumentError(absl::StrCat("no shape ", name, ": 0.1b, 1.5b or 7.2b"));
}

// Incompressible, the same for the same number.
std::vector<char> State(const Shape& shape, uint64_t number) {
  std::vector<char> state(shape.bytes());
  uint64_t x = 0x9e3779b97f4a7c15u * (number + 1);
  for (size_t i = 0; i + 8 <= state.size(); i += 8) {
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    std::memcpy(&state[i], &x, 8);
  }
  return state;
}

void Print(const char* name, const Shape& shape, std::vector<double> seconds) {
  double sum = 0;
  for (const double s : seconds) sum += s;
  std::sort(seconds.begin(), seconds.end());
  const auto rate = [&](double s) { return static_cast<double>(shape.bytes()) / s / 1e6; };
  const double median = seconds[seconds.size() / 2];
  std::cout
      << absl::StrFormat(
             "{\"case\": \"%s\", \"shape\": \"%s\", \"bytes\": %d, \"count\": %d, \"seconds\": {\"best\": %.6g, "
             "\"median\": %.6g, \"p90\": %.6g}, \"mb_per_s\": {\"best\": %.5g, \"median\": %.5g, \"mean\": %.5g}}",
             name, shape.name, shape.bytes(), seconds.size(), seconds.front(), median, seconds[seconds.size() * 9 / 10],
             rate(seconds.front()), rate(median), rate(sum / static_cast<double>(seconds.size())))
      << std::endl;
}

absl::Status Errno(const std::string& what) { return absl::ErrnoToStatus(errno, what); }

void Copies(const Shape& shape, int count) {
  std::vector<double> seconds;
  const std::vector<char> state = State(shape, 0);
  // As many slots as fit into no cache.
  std::vector<std::vector<char>> slots(std::max<size_t>(2, (size_t{256} << 20) / shape.bytes()), state);
  for (int i = 0; i < std::max<int>(count, static_cast<int>(slots.size())); ++i) {
    const double begin = Now();
    std::memcpy(slots[i % slots.size()].data(), slots[(i + 1) % slots.size()].data(), shape.bytes());
    seconds.push_back(Now() - begin);
  }
  Print("copy", shape, seconds);
}

// The disk alone, a file a state.
class Disk {
 public:
  Disk(std::string folder, const Shape& shape) : folder_(std::move(folder)), shape_(shape) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 4096, shape.bytes()) != 0) std::abort();
    memory_ = static_cast<char*>(memory);
    std::memcpy(memory_, State(shape, 0).data(), shape.bytes());
  }
  ~Disk() { std::free(memory_); }

  // Seconds until the file is durable.
  absl::StatusOr<double> Write(int number, bool direct) {
    const double begin = Now();
    const int fd = open(Path(number).c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC | (direct ? O_DIRECT : 0), 0600);
    if (fd < 0) return Errno(Path(number));
    absl::Status status;
    for (size_t at = 0; at < shape_.bytes() && status.ok(); at += kBlock) {
      const size_t bytes = std::min(kBlock, shape_.bytes() - at);
      if (write(fd, memory_ + at, bytes) != static_cast<ssize_t>(bytes)) status = Errno("write");
    }
    if (fdatasync(fd) != 0) status.Update(Errno("fdatasync"));
    const double seconds = Now() - begin;
    close(fd);
    if (!status.ok()) return status;
    return seconds;
  }

  // And removes it.
  absl::StatusOr<double> Read(int number) {
    const double begin = Now();
    const int fd = open(Path(number).c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
    if (fd < 0) return Errno(Path(number));
    absl::Status status;
    for (size_t at = 0; at < shape_.bytes() && status.ok(); at += kBlock) {
      const size_t bytes = std::min(kBlock, shape_.bytes() - at);
      if (read(fd, memory_ + at, bytes) != static_cast<ssize_t>(bytes)) status = Errno("read");
    }
    const double seconds = Now() - begin;
    close(fd);
    unlink(Path(number).c_str());
    if (!status.ok()) return status;
    return seconds;
  }

 private:
  std::string Path(int number) const { return absl::StrCat(folder_, "/disk_alone.", shape_.name, ".", number); }

  const std::string folder_;
  const Shape shape_;
  char* memory_ = nullptr;
};

class Store {
 public:
  explicit Store(const std::string& address)
      : catalog_(state_store::NewCatalogClient(common::MakeChannel(address))),
        records_(state_store::NewRecordsClient(common::MakeChannel(address, Bulk()), /*share_memory=*/true)),
        metrics_(*common::Metrics::Create("")),
        worker_metrics_(*metrics_),
        transfer_(worker::SnapshotTransfer::Options(), &worker_metrics_) {}

  absl::Status Save(const Shape& shape, int count, Disk& disk) {
    std::vector<double> seconds, writes, direct_writes;
    const auto aside = std::make_shared<std::vector<char>>(shape.bytes());
    for (int i = 0; i < count; ++i) {
      RWKV_ASSIGN_OR_RETURN(writes.emplace_back(), disk.Write(i, /*direct=*/false));
      RWKV_ASSIGN_OR_RETURN(direct_writes.emplace_back(), disk.Write(i, /*direct=*/true));
      RWKV_ASSIGN_OR_RETURN(const v1::AcquireLeaseResponse grant, Begin(shape, i));
      const std::vector<char> slot = State(shape, i);
      const double begin = Now();
      RWKV_RETURN_IF_ERROR(SaveOne(shape, i, grant, slot, aside));
      seconds.push_back(Now() - begin);
      v1::ReleaseLeaseRequest release;
      *release.mutable_lease() = grant.lease();
      RWKV_RETURN_IF_ERROR(catalog_->ReleaseLease(release, Deadline()).status());
    }
    Print("disk write", shape, writes);
    Print("disk write, direct", shape, direct_writes);
    Print("save", shape, seconds);
    return absl::OkStatus();
  }

  // Of sessions of their own, kAtOnce at a time: seconds a state.
  absl::Status SaveAtOnce(const Shape& shape, int count) {
    std::vector<v1::AcquireLeaseResponse> grants;
    for (int i = 0; i < count; ++i) {
      RWKV_ASSIGN_OR_RETURN(grants.emplace_back(), Begin(shape, count + i));
    }
    const std::vector<char> slot = State(shape, 0);
    return AtOnce("save, 4 at once", shape, count, [&](int i) {
      return SaveOne(shape, count + i, grants[i], slot, std::make_shared<std::vector<char>>(shape.bytes()));
    });
  }
  // What `save` has saved.
  absl::Status RestoreAtOnce(const Shape& shape, int count) {
    return AtOnce("restore, 4 at once", shape, count, [&](int i) {
      std::vector<char> aside(shape.bytes()), slot(shape.bytes());
      return RestoreOne(shape, i, &aside, &slot);
    });
  }

  // `disk` may be null.
  absl::Status Restore(const Shape& shape, int count, Disk* disk) {
    std::vector<double> seconds, reads;
    std::vector<char> aside(shape.bytes()), slot(shape.bytes());
    for (int i = 0; i < count; ++i) {
      if (disk != nullptr) {
        RWKV_ASSIGN_OR_RETURN(reads.emplace_back(), disk->Read(i));
      }
      const double begin = Now();
      RWKV_RETURN_IF_ERROR(RestoreOne(shape, i, &aside, &slot));
      seconds.push_back(Now() - begin);
      if (slot != State(shape, i)) return absl::DataLossError(absl::StrCat(Session(shape, i), " came back otherwise"));
    }
    if (disk != nullptr) Print("disk read", shape, reads);
    Print("restore", shape, seconds);
    return absl::OkStatus();
  }

 private:
  absl::Status SaveOne(const Shape& shape, int number, const v1::AcquireLeaseResponse& grant,
                       const std::vector<char>& slot, const std::shared_ptr<std::vector<char>>& aside) {
    std::memcpy(aside->data(), slot.data(), slot.size());
    v1::CommitSnapshotRequest commit;
    *commit.mutable_lease() = grant.lease();
    commit.set_log_branch(grant.log_branch());
    v1::SnapshotManifest& manifest = *commit.mutable_manifest();
    manifest.set_snapshot_id(absl::StrCat(Session(shape, number), "-", absl::ToUnixNanos(absl::Now())));
    manifest.set_session_id(Session(shape, number));
    manifest.set_position(1);
    manifest.set_model_fingerprint(kFingerprint);
    RWKV_ASSIGN_OR_RETURN(const std::vector<v1::RecordInfo> infos, Put(shape, manifest.snapshot_id(), aside));
    *manifest.mutable_records() = {infos.begin(), infos.end()};
    return catalog_->CommitSnapshot(commit, Deadline()).status();
  }

  absl::Status RestoreOne(const Shape& shape, int number, std::vector<char>* aside, std::vector<char>* slot) {
    v1::FindSnapshotRequest find;
    find.set_session_id(Session(shape, number));
    find.set_at_or_before(1);
    find.set_model_fingerprint(kFingerprint);
    RWKV_ASSIGN_OR_RETURN(const v1::FindSnapshotResponse found, catalog_->FindSnapshot(find, Deadline()));
    if (!found.has_manifest()) return absl::NotFoundError(absl::StrCat(Session(shape, number), " has no snapshot"));
    RWKV_RETURN_IF_ERROR(Get(found.manifest(), aside));
    std::memcpy(slot->data(), aside->data(), aside->size());
    return absl::OkStatus();
  }

  static absl::Status AtOnce(const char* name, const Shape& shape, int count,
                             const std::function<absl::Status(int)>& run) {
    std::vector<std::future<absl::Status>> threads;
    std::atomic<int> next{0};
    const double begin = Now();
    for (int t = 0; t < kAtOnce; ++t) {
      threads.push_back(std::async(std::launch::async, [&] {
        absl::Status status;
        for (int i = next++; i < count && status.ok(); i = next++) status = run(i);
        return status;
      }));
    }
    absl::Status status;
    for (std::future<absl::Status>& thread : threads) status.Update(thread.get());
    if (status.ok()) Print(name, shape, {(Now() - begin) / count});
    return status;
  }

  static common::ChannelOptions Bulk() {
    common::ChannelOptions options;
    options.bulk = true;
    return options;
  }
  static std::string Session(const Shape& shape, int number) { return absl::StrCat("bench-", shape.name, "-", number); }

  // A session of one token that is ours.
  absl::StatusOr<v1::AcquireLeaseResponse> Begin(const Shape& shape, int number) {
    v1::CreateSessionRequest create;
    create.set_session_id(Session(shape, number));
    RWKV_RETURN_IF_ERROR(catalog_->CreateSession(create, Deadline()).status());
    v1::AcquireLeaseRequest acquire;
    acquire.set_session_id(Session(shape, number));
    acquire.set_holder("state_bench");
    acquire.set_incarnation("1");
    acquire.mutable_ttl()->set_seconds(60);
    RWKV_ASSIGN_OR_RETURN(v1::AcquireLeaseResponse grant, catalog_->AcquireLease(acquire, Deadline()));
    v1::BeginTurnRequest begin;
    *begin.mutable_lease() = grant.lease();
    begin.set_request_id("turn");
    begin.add_token_ids(1);
    begin.set_model_fingerprint(kFingerprint);
    RWKV_RETURN_IF_ERROR(catalog_->BeginTurn(begin, Deadline()).status());
    return grant;
  }

  absl::StatusOr<std::vector<v1::RecordInfo>> Put(const Shape& shape, const std::string& snapshot_id,
                                                  const std::shared_ptr<const std::vector<char>>& state) {
    std::promise<absl::StatusOr<std::vector<v1::RecordInfo>>> done;
    worker::SnapshotTransfer::SaveJob job;
    job.store = records_;
    job.snapshot_id = snapshot_id;
    job.bytes = static_cast<int64_t>(state->size());
    job.owner = state;
    job.records = [&]() -> absl::StatusOr<std::vector<absl::Span<const char>>> {
      std::vector<absl::Span<const char>> records;
      for (size_t layer = 0; layer < shape.layers; ++layer) {
        records.push_back(absl::MakeConstSpan(*state).subspan(layer * shape.record_bytes(), shape.record_bytes()));
      }
      return records;
    };
    job.wanted = [] { return true; };
    job.done = [&done](absl::StatusOr<std::vector<v1::RecordInfo>> infos) { done.set_value(std::move(infos)); };
    RWKV_RETURN_IF_ERROR(transfer_.Save(std::move(job)));
    return done.get_future().get();
  }

  absl::Status Get(const v1::SnapshotManifest& manifest, std::vector<char>* aside) {
    std::promise<absl::Status> done;
    worker::SnapshotTransfer::LoadJob job;
    job.store = records_;
    job.records = {manifest.records().begin(), manifest.records().end()};
    job.room = [&]() -> absl::StatusOr<std::vector<absl::Span<char>>> {
      std::vector<absl::Span<char>> room;
      size_t at = 0;
      for (const v1::RecordInfo& info : manifest.records()) {
        room.push_back(absl::MakeSpan(*aside).subspan(at, info.bytes()));
        at += info.bytes();
      }
      return room;
    };
    job.wanted = [] { return true; };
    job.done = [&](const absl::Status& status) { done.set_value(status); };
    RWKV_RETURN_IF_ERROR(transfer_.Load(std::move(job)));
    return done.get_future().get();
  }

  const std::unique_ptr<state_store::CatalogClient> catalog_;
  const std::shared_ptr<state_store::RecordsClient> records_;
  const std::unique_ptr<common::Metrics> metrics_;
  worker::WorkerMetrics worker_metrics_;
  worker::SnapshotTransfer transfer_;
};

// False: those are the arguments of no command.
absl::StatusOr<bool> Run(const std::vector<std::string>& arguments) {
  const size_t size = arguments.size();
  const bool is_copy = size == 3 && arguments[0] == "copy";
  const bool is_save = size == 5 && arguments[0] == "save";
  const bool is_restore = (size == 4 || size == 5) && arguments[0] == "restore";
  int count = 0;
  if (!is_copy && !is_save && !is_restore) return false;
  if (!absl::SimpleAtoi(arguments[is_copy ? 2 : 3], &count) || count < 1) return false;
  RWKV_ASSIGN_OR_RETURN(const Shape shape, FindShape(arguments[is_copy ? 1 : 2]));
  if (is_copy) {
    Copies(shape, count);
    return true;
  }
  Store store(arguments[1]);
  Disk disk(size == 5 ? arguments[4] : "", shape);
  RWKV_RETURN_IF_ERROR(is_save ? store.Save(shape, count, disk)
                               : store.Restore(shape, count, size == 5 ? &disk : nullptr));
  RWKV_RETURN_IF_ERROR(is_save ? store.SaveAtOnce(shape, count) : store.RestoreAtOnce(shape, count));
  return true;
}

}  // namespace
}  // namespace rwkv

int main(int argc, char** argv) {
  rwkv::common::KeepFreedMemory();  // As the worker does.
  const absl::StatusOr<bool> done = rwkv::Run({argv + 1, argv + argc});
  if (!done.ok()) std::cerr << "state_bench: " << done.status() << "\n";
  if (done.ok() && !*done) std::cerr << "usage: state_bench copy|save|restore ..., as its source begins with\n";
  return done.ok() && *done ? 0 : 2;
}
