// A checkpoint as named tensors, memory-mapped.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "services/checkpoint/adapter.h"
#include "services/checkpoint/container.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/formats/mapped_file.h"
#include "services/checkpoint/formats/tensor_record.h"
#include "services/checkpoint/shards.h"

namespace rwkv::checkpoint {

// What the file says about a tensor; its bytes have not been touched.
struct TensorInfo {
  std::string name;  // The original one of BlinkDL's files, whatever the file calls it.
  ElementType type = ElementType::kFloat32;
  std::vector<int64_t> shape;  // Each >= 0; empty for a scalar.
  int64_t bytes = 0;           // Product of shape times the element's size.
};

// How a reader wants the elements, row-major in any case.
enum class Form : uint8_t {
  kPlain,       // As TensorInfo says.
  kMatrix,      // The same, but a matrix in ggml's blocks stays in them.
  kTransposed,  // As kMatrix, with the last two dimensions exchanged. There must be two.
};

// A tensor's elements: row-major, contiguous, aligned to the element (to no more). Lives as long as its Checkpoint.
struct Tensor {
  const TensorInfo* info = nullptr;
  const void* data = nullptr;
  int64_t bytes = 0;
  BlockType blocks = BlockType::kNone;  // Not kNone: rows of these, aligned to nothing, whatever type `info` has.
};

// Thread-safe. The file must not change while it is open (replace a checkpoint by rename, as every writer here does):
// a file that shrinks under its map kills the process with SIGBUS.
class Checkpoint {
 public:
  // Finds format and dialect by content: safetensors and .pth (zip, or as torch < 1.6 wrote it) with the names of
  // BlinkDL, Hugging Face or web-rwkv; GGUF; rwkv.cpp. Reads the directory of the file and nothing else, so it costs
  // the same for any size of model. `path` may also be what stands for several files: shards.h.
  //   kNotFound: no such file. kPermissionDenied: not readable.
  //   kDataLoss: the file is shorter than it says.
  //   kInvalidArgument: not a checkpoint, or one that contradicts itself; the message names file, tensor and values.
  //   kUnimplemented: a known format or variant that this build does not read.
  static absl::StatusOr<std::shared_ptr<const Checkpoint>> Open(const std::string& path);

  // The same with an adapter merged: its matrices are added as they are read, in fp32, and cast back to the stored
  // type; see adapter.h for the formula and for errors of `adapter`.
  //   kInvalidArgument: the adapter has a tensor that the model has not, or of another shape.
  //   kFailedPrecondition: it changes a matrix that is quantized here.
  static absl::StatusOr<std::shared_ptr<const Checkpoint>> OpenWithAdapter(const std::string& path,
                                                                           const AdapterOptions& adapter);

  ~Checkpoint();
  Checkpoint(const Checkpoint&) = delete;
  Checkpoint& operator=(const Checkpoint&) = delete;

  const std::string& path() const { return path_; }
  absl::string_view format() const { return container_.format; }    // "safetensors", "pth", "pth-legacy", "gguf", ...
  absl::string_view dialect() const { return container_.dialect; }  // "", "web-rwkv", "hugging-face"
  int64_t file_bytes() const { return file_bytes_; }                // Of all its files.

  // What a user should know of how the file was read, a sentence each: objects that were skipped, a head that is not
  // there.
  absl::Span<const std::string> notes() const { return container_.notes; }

  // Sorted by name, names unique.
  absl::Span<const TensorInfo> tensors() const { return infos_; }
  const TensorInfo* Find(absl::string_view name) const;  // nullptr: not in the file.

  // The elements. Views into the map where the file holds them as they are wanted, contiguous and aligned; the others
  // (in another order, decoded from blocks, merged, at odd offsets) are copied at the first call, without leaving the
  // source in memory. What the tensors cover is at most twice the file, so copies are bounded by that, times eight at
  // worst (four-bit blocks as fp32).
  // kNotFound: no such tensor. kDataLoss: the file has been cut since it was opened.
  absl::StatusOr<Tensor> Read(absl::string_view name, Form form = Form::kPlain) const ABSL_LOCKS_EXCLUDED(mu_);

  // For those who have made something else of what Read() gave: it stays valid, but if it is mapped, it leaves memory
  // until somebody touches it.
  void Forget(absl::string_view name, Form form) const ABSL_LOCKS_EXCLUDED(mu_);

  // Bytes [offset, offset + out.size()) of the tensor's row-major content, without mapping any page where the file
  // holds it contiguous and without keeping a copy: for those who look at a little of everything, or once at
  // everything. offset and size are multiples of the element's.
  // kDataLoss: the file has been cut since it was opened.
  absl::Status ReadBytes(const TensorInfo& info, int64_t offset, absl::Span<uint8_t> out) const;

  // Elements [first, first + out.size()) of a tensor of fp32, bf16 or fp16, exactly, and with an adapter's update added
  // in fp32, not rounded to the stored type as Read() and ReadBytes() give it. Else as ReadBytes().
  absl::Status ReadFloats(const TensorInfo& info, int64_t first, absl::Span<float> out) const;

  // safetensors' __metadata__, GGUF's keys as texts. "quantisation.group" is there if tensors are quantized: X of int8
  // [out, in] or uint8 [out, in / 2] (two weights a byte, the even one low), X.scale and X.min fp16 [out, groups].
  const std::map<std::string, std::string>& metadata() const { return container_.metadata; }

  // The bytes of every token, by id, that the file itself brings (GGUF does); empty for ids that stand for no text.
  // kNotFound: it brings none. kUnimplemented: of another kind than RWKV's. kInvalidArgument: malformed.
  absl::StatusOr<std::vector<std::string>> Vocabulary() const;

 private:
  // Where a tensor comes from; parallel to infos_.
  struct Source {
    const TensorRecord* record = nullptr;
    const MappedFile* file = nullptr;
    const Adapter::Update* update = nullptr;  // Null: none.
  };

  Checkpoint(std::string path, std::unique_ptr<const Adapter> adapter);

  static absl::StatusOr<std::shared_ptr<const Checkpoint>> Open(const std::string& path,
                                                                std::unique_ptr<const Adapter> adapter);
  absl::Status ReadDirectory(const Shards& shards);
  absl::Status AddTensor(const TensorRecord& record, const MappedFile& file);
  absl::Status AddAdapter();
  TensorRecord RecordOf(const TensorInfo& info, Form form) const;
  absl::Status Copy(const TensorInfo& info, const TensorRecord& wanted, bool in_blocks, absl::Span<uint8_t> out) const;
  absl::Status CopyTransposed(const TensorInfo& info, absl::Span<uint8_t> out) const;
  absl::Status MergeBytes(const TensorInfo& info, int64_t offset, absl::Span<uint8_t> out) const;
  const Source& SourceOf(const TensorInfo& info) const { return sources_[&info - infos_.data()]; }

  const std::string path_;
  const std::unique_ptr<const Adapter> adapter_;  // Null: none.
  std::vector<std::unique_ptr<MappedFile>> files_;
  int64_t file_bytes_ = 0;
  Container container_;
  std::vector<TensorInfo> infos_;
  std::vector<Source> sources_;
  int64_t stored_bytes_ = 0;  // What the tensors cover in the file, shared bytes counted as often as they are.

  mutable absl::Mutex mu_;
  mutable absl::flat_hash_map<std::pair<const TensorInfo*, Form>, std::unique_ptr<uint8_t[]>> copies_
      ABSL_GUARDED_BY(mu_);
};

}  // namespace rwkv::checkpoint
