#include "kernels/conformance/protected_device.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "kernels/api/op_table.h"
#include "kernels/base/buffer.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels::conformance {
namespace {

constexpr int64_t kArenaBytes = int64_t{1} << 38;  // Of addresses; memory only where it is touched.
constexpr int64_t kPageBytes = 4096;

int64_t RoundUp(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Addresses of which those that were given can be touched while somebody holds them open. A buffer ends where its pages
// end, at most 63 bytes before, with a page behind it that nobody may touch: what reaches too far faults, and what
// reaches a page too far to the front as well. None is given twice, so that a pointer that outlived its buffer faults.
class Arena {
 public:
  Arena()
      : base_(static_cast<char*>(
            mmap(nullptr, kArenaBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    if (base_ == MAP_FAILED || self_memory_ < 0) std::abort();
    absl::MutexLock lock(&arenas_mu_);
    Arenas()[base_] = this;
  }
  ~Arena() {
    {
      absl::MutexLock lock(&arenas_mu_);
      Arenas().erase(base_);
    }
    munmap(base_, kArenaBytes);
    close(self_memory_);
  }

  absl::StatusOr<Buffer> Take(int64_t bytes) {
    absl::MutexLock lock(&mu_);
    if (bytes > kArenaBytes - used_ - 3 * kPageBytes) {
      return absl::ResourceExhaustedError(absl::StrCat("no memory for ", bytes, " bytes"));
    }
    char* const pages = base_ + used_ + kPageBytes;
    const int64_t page_bytes = RoundUp(bytes, kPageBytes);
    used_ += kPageBytes + page_bytes;
    given_[pages] = page_bytes;
    mprotect(pages, static_cast<size_t>(page_bytes), PROT_READ | PROT_WRITE);
    std::memset(pages, 0xff, static_cast<size_t>(page_bytes));
    if (holders_ == 0) mprotect(pages, static_cast<size_t>(page_bytes), PROT_NONE);
    return Buffer(pages + page_bytes - RoundUp(bytes, kBufferAlignment), bytes, Release);
  }

  // Of one buffer's bytes, or of host memory: copies past the protection, which is quicker than lifting it.
  void Read(const void* from, int64_t bytes, char* to) {
    if (!Owns(from, bytes)) {
      std::memcpy(to, from, static_cast<size_t>(bytes));
    } else if (pread(self_memory_, to, static_cast<size_t>(bytes), reinterpret_cast<off_t>(from)) != bytes) {
      std::abort();
    }
  }
  void Write(void* to, int64_t bytes, const char* from) {
    if (!Owns(to, bytes)) {
      std::memcpy(to, from, static_cast<size_t>(bytes));
    } else if (pwrite(self_memory_, from, static_cast<size_t>(bytes), reinterpret_cast<off_t>(to)) != bytes) {
      std::abort();
    }
  }

  void Open() {
    absl::MutexLock lock(&mu_);
    if (holders_++ == 0) ProtectAll(PROT_READ | PROT_WRITE);
  }
  void Close() {
    absl::MutexLock lock(&mu_);
    if (--holders_ == 0) ProtectAll(PROT_NONE);
  }

 private:
  // By address; a buffer knows no more of where it is from.
  static std::map<char*, Arena*>& Arenas() ABSL_EXCLUSIVE_LOCKS_REQUIRED(arenas_mu_) {
    static auto* const arenas = new std::map<char*, Arena*>;
    return *arenas;
  }

  static void Release(void* memory, int64_t) {
    char* const address = static_cast<char*>(memory);
    absl::MutexLock lock(&arenas_mu_);
    std::prev(Arenas().upper_bound(address))->second->GiveBack(address);
  }

  void GiveBack(char* address) {
    absl::MutexLock lock(&mu_);
    const auto it = std::prev(given_.upper_bound(address));
    madvise(it->first, static_cast<size_t>(it->second), MADV_DONTNEED);
    mprotect(it->first, static_cast<size_t>(it->second), PROT_NONE);
    given_.erase(it);
  }

  // Whether the bytes are of a buffer. Ends the process if they are where buffers may be, but not of one.
  bool Owns(const void* memory, int64_t bytes) {
    char* const address = const_cast<char*>(static_cast<const char*>(memory));
    if (address < base_ || address >= base_ + kArenaBytes) return false;
    absl::MutexLock lock(&mu_);
    const auto after = given_.upper_bound(address);
    if (after == given_.begin()) std::abort();
    const auto [pages, page_bytes] = *std::prev(after);
    if (address + bytes > pages + page_bytes) std::abort();
    return true;
  }

  void ProtectAll(int access) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    for (const auto& [pages, bytes] : given_) {
      if (mprotect(pages, static_cast<size_t>(bytes), access) != 0) std::abort();
    }
  }

  static absl::Mutex arenas_mu_;  // Before mu_.

  char* const base_;
  const int self_memory_ = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
  absl::Mutex mu_;
  std::map<char*, int64_t> given_ ABSL_GUARDED_BY(mu_);  // Pages and their bytes.
  int64_t used_ ABSL_GUARDED_BY(mu_) = 0;
  int holders_ ABSL_GUARDED_BY(mu_) = 0;
};

absl::Mutex Arena::arenas_mu_(absl::kConstInit);

class Opened {
 public:
  explicit Opened(Arena& arena) : arena_(arena) { arena_.Open(); }
  ~Opened() { arena_.Close(); }

 private:
  Arena& arena_;
};

class ProtectedStream final : public Stream {
 public:
  ProtectedStream(const OpTable& ops, Arena& arena, std::unique_ptr<Stream> stream)
      : ops_(ops), arena_(arena), stream_(std::move(stream)) {}

  absl::Status Copy(void* to, const void* from, int64_t bytes) override {
    if (bytes == 0) return absl::OkStatus();
    std::vector<char> copy(static_cast<size_t>(bytes));
    arena_.Read(from, bytes, copy.data());
    arena_.Write(to, bytes, copy.data());
    return absl::OkStatus();
  }
  absl::Status Zero(void* memory, int64_t bytes) override {
    const std::vector<char> zeros(static_cast<size_t>(bytes));
    if (bytes > 0) arena_.Write(memory, bytes, zeros.data());
    return absl::OkStatus();
  }
  absl::Status Record(Event& event) override { return stream_->Record(event); }
  absl::StatusOr<void*> Scratch(int64_t bytes) override { return stream_->Scratch(bytes); }
  absl::Status Synchronize() override { return stream_->Synchronize(); }

  // An operation of the device that is protected.
  template <typename Args>
  absl::Status Run(absl::Status (*OpTable::*op)(const Args&, Stream&), const Args& args) {
    const Opened opened(arena_);
    return (ops_.*op)(args, *stream_);
  }

 private:
  const OpTable& ops_;
  Arena& arena_;
  const std::unique_ptr<Stream> stream_;
};

template <auto kOp, typename Args>
absl::Status RunProtected(const Args& args, Stream& stream) {
  return static_cast<ProtectedStream&>(stream).Run(kOp, args);
}

class ProtectedDevice final : public Device {
 public:
  explicit ProtectedDevice(std::unique_ptr<Device> device) : device_(std::move(device)) {}

  absl::string_view name() const override { return device_->name(); }
  absl::string_view numeric_family() const override { return device_->numeric_family(); }

  absl::StatusOr<Buffer> Allocate(int64_t bytes, MemoryKind kind) override {
    if (kind != MemoryKind::kDevice || bytes <= 0) return device_->Allocate(bytes, kind);
    return arena_.Take(bytes);
  }

  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override {
    RWKV_ASSIGN_OR_RETURN(std::unique_ptr<Stream> stream, device_->NewStream());
    return std::make_unique<ProtectedStream>(device_->ops(), arena_, std::move(stream));
  }
  absl::StatusOr<std::unique_ptr<Event>> NewEvent() override { return device_->NewEvent(); }
  absl::StatusOr<Weight> Load(const MatrixView& matrix, WeightUse use) override { return device_->Load(matrix, use); }

  const OpTable& ops() const override {
    static constexpr OpTable kOps = {RunProtected<&OpTable::embed>,
                                     RunProtected<&OpTable::layer_norm>,
                                     RunProtected<&OpTable::mix_input>,
                                     RunProtected<&OpTable::products>,
                                     RunProtected<&OpTable::wkv4>,
                                     RunProtected<&OpTable::wkv6>,
                                     RunProtected<&OpTable::wkv7>,
                                     RunProtected<&OpTable::deep_embed>,
                                     RunProtected<&OpTable::deep_embed_attention>};
    return kOps;
  }

 private:
  Arena arena_;
  const std::unique_ptr<Device> device_;
};

}  // namespace

std::unique_ptr<Device> ProtectDevice(std::unique_ptr<Device> device) {
  return std::make_unique<ProtectedDevice>(std::move(device));
}

}  // namespace rwkv::kernels::conformance
