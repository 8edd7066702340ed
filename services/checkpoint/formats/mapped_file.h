// A whole file, read-only, in memory when touched.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace rwkv::checkpoint {

class MappedFile {
 public:
  // kNotFound, kPermissionDenied; kInvalidArgument: not a regular file, or an empty one. Errors name the path.
  static absl::StatusOr<std::unique_ptr<MappedFile>> Open(const std::string& path);

  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  // Touching a page maps it and its neighbours, which then count as this process's memory.
  absl::Span<const uint8_t> bytes() const { return bytes_; }

  // Unmaps bytes [offset, offset + size) and what was mapped with them, until somebody touches them again: for those
  // who looked at them and are done. Spans of bytes() stay valid.
  void Forget(int64_t offset, int64_t size) const;

  // Copies without mapping: for those who look at a few bytes in many places. kDataLoss: the file has been cut since.
  absl::Status ReadAt(int64_t offset, absl::Span<uint8_t> out) const;

 private:
  MappedFile(int descriptor, absl::Span<const uint8_t> bytes) : descriptor_(descriptor), bytes_(bytes) {}

  const int descriptor_;
  const absl::Span<const uint8_t> bytes_;
};

}  // namespace rwkv::checkpoint
