#include "kernels/conformance/protected_device.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "kernels/api/op_table.h"
#include "kernels/base/status_macros.h"

namespace rwkv::kernels::conformance {
namespace {

constexpr int64_t kArenaBytes = int64_t{1} << 38;  // Of addresses; memory only where it is touched.
constexpr int64_t kPageBytes = 4096;

// Never given again, so that a pointer that outlived its buffer is found out.
void Release(void* memory, int64_t bytes) { madvise(memory, static_cast<size_t>(bytes), MADV_DONTNEED); }

// Addresses that can be touched while somebody holds them open.
class Arena {
 public:
  Arena()
      : base_(static_cast<char*>(
            mmap(nullptr, kArenaBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    if (base_ == MAP_FAILED) std::abort();
  }
  ~Arena() { munmap(base_, kArenaBytes); }

  void* Take(int64_t bytes) {
    absl::MutexLock lock(&mu_);
    if (bytes > kArenaBytes - used_ - 2 * kPageBytes) return nullptr;
    char* const memory = base_ + used_;
    used_ += (bytes + kPageBytes - 1) / kPageBytes * kPageBytes + kPageBytes;  // A page between two stays untouched.
    return memory;
  }

  void Open() {
    absl::MutexLock lock(&mu_);
    if (holders_++ == 0) Protect(PROT_READ | PROT_WRITE);
  }
  void Close() {
    absl::MutexLock lock(&mu_);
    if (--holders_ == 0) Protect(PROT_NONE);
  }

 private:
  void Protect(int access) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (used_ > 0 && mprotect(base_, static_cast<size_t>(used_), access) != 0) std::abort();
  }

  char* const base_;
  absl::Mutex mu_;
  int64_t used_ ABSL_GUARDED_BY(mu_) = 0;
  int holders_ ABSL_GUARDED_BY(mu_) = 0;
};

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
    const Opened opened(arena_);
    return stream_->Copy(to, from, bytes);
  }
  absl::Status Zero(void* memory, int64_t bytes) override {
    const Opened opened(arena_);
    return stream_->Zero(memory, bytes);
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
    void* const memory = arena_.Take(bytes);
    if (memory == nullptr) return absl::ResourceExhaustedError(absl::StrCat("no memory for ", bytes, " bytes"));
    arena_.Open();
    std::memset(memory, 0xff, static_cast<size_t>(bytes));
    arena_.Close();
    return Buffer(memory, bytes, Release);
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
