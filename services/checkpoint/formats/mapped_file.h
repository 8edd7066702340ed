// A whole file, read-only, in memory when touched.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"

namespace rwkv::checkpoint {

// Thread-safe.
class MappedFile {
 public:
  // kNotFound, kPermissionDenied; kInvalidArgument: not a regular file, or an empty one. Errors name the path.
  static absl::StatusOr<std::unique_ptr<MappedFile>> Open(const std::string& path);

  // Of an open descriptor, which becomes the file's; `name` is for errors.
  static absl::StatusOr<std::unique_ptr<MappedFile>> OfDescriptor(int descriptor, const std::string& name);

  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  // Touching a byte maps what the page cache holds with it, up to kNeighbourhood, which then counts as this process's
  // memory: for those who look and Forget().
  static constexpr int64_t kNeighbourhood = 2 << 20;
  absl::Span<const uint8_t> bytes() const { return bytes_; }

  // Bytes [offset, offset + size), 0 < size, of which touching maps no page but their own: for those who keep them.
  // Lives as long as the file. kResourceExhausted: the process has too many maps.
  absl::StatusOr<const uint8_t*> View(int64_t offset, int64_t size) const ABSL_LOCKS_EXCLUDED(mu_);

  // Unmaps bytes [offset, offset + size) and what was mapped with them, until somebody touches them again: for those
  // who looked at them and are done. Spans of bytes() stay valid.
  void Forget(int64_t offset, int64_t size) const;

  // The pages of a View() leave memory until somebody touches them again.
  void ForgetView(const uint8_t* view, int64_t size) const;

  // Copies without mapping: for those who look at a few bytes in many places. kDataLoss: the file has been cut since.
  absl::Status ReadAt(int64_t offset, absl::Span<uint8_t> out) const;

 private:
  MappedFile(int descriptor, absl::Span<const uint8_t> bytes) : descriptor_(descriptor), bytes_(bytes) {}

  const int descriptor_;
  const absl::Span<const uint8_t> bytes_;

  mutable absl::Mutex mu_;
  // Maps by their first page and size in the file.
  mutable std::map<std::pair<int64_t, int64_t>, const uint8_t*> views_ ABSL_GUARDED_BY(mu_);
};

// Forgets what a reader is done with (byte_reader.h, DoneWith), going forward: each header between tensors may bring a
// neighbourhood of weights into memory.
class ForgetBehind {
 public:
  explicit ForgetBehind(const MappedFile& file) : file_(&file) {}

  void operator()(uint64_t offset, uint64_t size) {
    const uint64_t end = offset + size;
    if (end < looked_at_ + MappedFile::kNeighbourhood) return;
    file_->Forget(static_cast<int64_t>(looked_at_), static_cast<int64_t>(end - looked_at_));
    looked_at_ = end;
  }

 private:
  const MappedFile* file_;
  uint64_t looked_at_ = 0;
};

}  // namespace rwkv::checkpoint
