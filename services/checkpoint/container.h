// The file or files of a checkpoint of any format as records with the original names and layouts.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/byte_reader.h"
#include "services/checkpoint/formats/mapped_file.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {

struct Container {
  absl::string_view format;           // "safetensors", "pth", "pth-legacy", "gguf", "rwkv.cpp"
  absl::string_view dialect;          // "": as the container's; else whose names it has: "web-rwkv", "hugging-face"
  std::vector<TensorRecord> records;  // Sorted by name, names unique.
  std::map<std::string, std::string> metadata;  // safetensors' __metadata__, GGUF's keys; empty for others.
  std::vector<absl::string_view> tokens;        // GGUF's vocabulary, see formats/gguf.h.
  std::vector<int32_t> token_types;
  std::vector<std::string> notes;  // What a user should know: what was left out or made up. A sentence each.
};

// One of the files that a model is cut into; see shards.h.
struct ContainerFile {
  absl::Span<const uint8_t> bytes;                 // The whole file.
  std::string path;                                // For messages.
  const std::set<std::string>* tensors = nullptr;  // Its names in the file, as an index has them; null: nobody knows.
};

// The file, unpacked if it is a compressed archive (formats/inflated_zip.h). Errors name the path.
absl::StatusOr<std::unique_ptr<MappedFile>> OpenFile(const std::string& path);

// Told by content. Reads the directory of every file, and nothing else; done(file, offset, size) as DoneWith.
// All have one format, and no name is in two of them; a record says in which it is.
//   kDataLoss: a file is shorter than it says.
//   kInvalidArgument: not a checkpoint, or one that contradicts itself; the message names tensor and values.
//   kUnimplemented: a known format or variant that this build does not read.
absl::StatusOr<Container> ReadContainer(absl::Span<const ContainerFile> files,
                                        absl::FunctionRef<void(size_t file, uint64_t offset, uint64_t size)> done);

// Of a model in one file.
absl::StatusOr<Container> ReadContainer(absl::Span<const uint8_t> file, DoneWith done = KeepAll);

}  // namespace rwkv::checkpoint
