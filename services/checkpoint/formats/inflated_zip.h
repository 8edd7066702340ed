// A zip archive whose members are compressed, unpacked as a whole: torch.load takes what other zip programs have packed
// again, and tensors can only be mapped from members that are stored as they are.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "services/checkpoint/formats/mapped_file.h"

namespace rwkv::checkpoint {

// Compressed floats shrink by a third at most, texts by a few times; beyond this it is no checkpoint.
constexpr int64_t kMaxInflation = 16;
constexpr int64_t kInflationSlackBytes = 16 << 20;

// `file` itself, unless it is a zip archive with deflated members: then the same archive with all members stored, in
// memory that no disk holds.
//   kInvalidArgument: it would be larger than kMaxInflation times the file (and the slack), or a member does not
//   inflate to what the directory says. kResourceExhausted: no memory for it. Errors of ReadZipDirectory.
absl::StatusOr<std::unique_ptr<MappedFile>> InflateZip(std::unique_ptr<MappedFile> file);

}  // namespace rwkv::checkpoint
