// A whole file, read-only, in memory when touched.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace rwkv::worker {

class MappedFile {
 public:
  // kNotFound, kPermissionDenied; kInvalidArgument: not a regular file, or an empty one.
  static absl::StatusOr<std::unique_ptr<MappedFile>> Open(const std::string& path);

  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  absl::Span<const uint8_t> bytes() const { return bytes_; }

 private:
  explicit MappedFile(absl::Span<const uint8_t> bytes) : bytes_(bytes) {}

  const absl::Span<const uint8_t> bytes_;
};

}  // namespace rwkv::worker
