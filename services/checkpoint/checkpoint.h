// One checkpoint file as named tensors, memory-mapped.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/formats/mapped_file.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {

// What the file says about a tensor; its bytes have not been touched.
struct TensorInfo {
  std::string name;  // Without the prefixes trainers add ("_forward_module.", "model.").
  ElementType type = ElementType::kFloat32;
  std::vector<int64_t> shape;  // Each >= 0; empty for a scalar.
  int64_t bytes = 0;           // Product of shape times the element's size.
};

// A tensor's elements: row-major, contiguous, aligned to the element (to no more). Lives as long as its Checkpoint.
struct Tensor {
  const TensorInfo* info = nullptr;
  const void* data = nullptr;
};

// Thread-safe. The file must not change while it is open (replace a checkpoint by rename, as every writer here does):
// a file that shrinks under its map kills the process with SIGBUS.
class Checkpoint {
 public:
  // Finds the format by content: safetensors, .pth as a zip archive, .pth as torch < 1.6 wrote it. Reads the directory
  // of the file and nothing else, so it costs the same for any size of model.
  //   kNotFound: no such file. kPermissionDenied: not readable.
  //   kDataLoss: the file is shorter than it says.
  //   kInvalidArgument: not a checkpoint, or one that contradicts itself; the message names file, tensor and values.
  //   kUnimplemented: a known format that this build does not read (GGUF, rwkv.cpp, big-endian or compressed .pth).
  static absl::StatusOr<std::shared_ptr<const Checkpoint>> Open(const std::string& path);

  ~Checkpoint();
  Checkpoint(const Checkpoint&) = delete;
  Checkpoint& operator=(const Checkpoint&) = delete;

  const std::string& path() const { return path_; }
  absl::string_view format() const { return format_; }  // "safetensors", "pth", "pth-legacy"
  int64_t file_bytes() const { return static_cast<int64_t>(file_->bytes().size()); }

  // Sorted by name, names unique.
  absl::Span<const TensorInfo> tensors() const { return infos_; }
  const TensorInfo* Find(absl::string_view name) const;  // nullptr: not in the file.

  // The elements. Views into the map where the file holds them contiguous and aligned; the others (transposed views of
  // a .pth, odd offsets) are copied at the first call. All tensors together are at most twice the file, so copies are.
  // kNotFound: no such tensor.
  absl::StatusOr<Tensor> Read(absl::string_view name) const ABSL_LOCKS_EXCLUDED(mu_);

  // Bytes [offset, offset + out.size()) of the tensor's row-major content, without mapping any page where the file
  // holds it contiguous: for those who look at a little of everything. offset and size are multiples of the element's.
  // kDataLoss: the file has been cut since it was opened.
  absl::Status ReadBytes(const TensorInfo& info, int64_t offset, absl::Span<uint8_t> out) const;

  // safetensors' __metadata__; empty for other formats.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  Checkpoint(std::string path, std::unique_ptr<MappedFile> file);

  absl::Status ReadDirectory();
  absl::Status AddRecords(std::vector<TensorRecord> records);
  const TensorRecord& RecordOf(const TensorInfo& info) const { return records_[&info - infos_.data()]; }

  const std::string path_;
  const std::unique_ptr<MappedFile> file_;
  absl::string_view format_;
  std::vector<TensorInfo> infos_;
  std::vector<TensorRecord> records_;  // Parallel to infos_.
  std::map<std::string, std::string> metadata_;

  mutable absl::Mutex mu_;
  mutable absl::flat_hash_map<const TensorInfo*, std::unique_ptr<uint8_t[]>> copies_ ABSL_GUARDED_BY(mu_);
};

}  // namespace rwkv::checkpoint
