// A checkpoint file of any format as records with the original names and layouts.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/byte_reader.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {

struct Container {
  absl::string_view format;           // "safetensors", "pth", "pth-legacy", "gguf", "rwkv.cpp"
  absl::string_view dialect;          // "": as the container's; else whose names it has: "web-rwkv", "hugging-face"
  std::vector<TensorRecord> records;  // Sorted by name, names unique.
  std::map<std::string, std::string> metadata;  // safetensors' __metadata__, GGUF's keys; empty for others.
  std::vector<absl::string_view> tokens;        // GGUF's vocabulary, see formats/gguf.h.
  std::vector<int32_t> token_types;
};

// Told by content. Reads the directory of `file`, the whole file, and nothing else.
//   kDataLoss: the file is shorter than it says.
//   kInvalidArgument: not a checkpoint, or one that contradicts itself; the message names tensor and values.
//   kUnimplemented: a known format or variant that this build does not read.
absl::StatusOr<Container> ReadContainer(absl::Span<const uint8_t> file, DoneWith done = KeepAll);

}  // namespace rwkv::checkpoint
