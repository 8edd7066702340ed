// The members of a zip archive, stored as they are, as torch.save writes them (with ZIP64 for large files, and data
// descriptors), or deflated, as others pack them again. Format: PKWARE APPNOTE 6.3.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/byte_reader.h"

namespace rwkv::checkpoint {

struct ZipMember {
  absl::string_view name;  // A view of the file.
  uint64_t offset = 0;     // Of the payload, in bytes from the start of the file.
  uint64_t size = 0;       // Bytes, unpacked.
  uint64_t stored_size = 0;
  bool is_deflated = false;  // Else stored_size is size.
};

// In the order of the central directory, which alone is trusted for sizes: local headers may leave them out. Payloads
// lie inside the file and overlap neither each other nor a header. Checksums are not verified: torch can be told not to
// write them, and reading them would read the whole model.
//   kDataLoss: no end of central directory (the file is cut), or something lies beyond the end.
//   kUnimplemented: members that are encrypted or compressed otherwise, more than one disk.
//   kInvalidArgument: anything else that contradicts the format.
absl::StatusOr<std::vector<ZipMember>> ReadZipDirectory(absl::Span<const uint8_t> file, DoneWith done = KeepAll);

}  // namespace rwkv::checkpoint
