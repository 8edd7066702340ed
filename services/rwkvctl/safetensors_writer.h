// Writes .safetensors files. Source: huggingface/safetensors, README, "Format".
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace rwkv::rwkvctl {

// A tensor that comes in pieces.
struct Tensor {
  std::string name;
  std::vector<int64_t> shape;
  std::string data;  // Little-endian, of `dtype`, which has 4 bytes.
  std::string dtype = "F32";
};

// Puts tensors together from pieces: those of one tensor come in order; others may come in between.
class TensorCollector {
 public:
  static constexpr uint64_t kMaxBytes = uint64_t{16} << 30;  // All tensors together.

  // kDataLoss naming the tensor: a piece is missing, too long, there twice or of another shape.
  absl::Status Add(const std::string& name, const std::vector<int64_t>& shape, uint64_t offset_bytes,
                   absl::string_view data);
  // kDataLoss: a tensor is incomplete, or there is none.
  absl::Status Finish() const;

  const std::vector<Tensor>& tensors() const { return tensors_; }

 private:
  std::vector<Tensor> tensors_;
  uint64_t total_bytes_ = 0;  // As the shapes announce.
};

// What a file's header says of a tensor.
struct TensorHeader {
  std::string name;
  std::string dtype;  // "F32"
  std::vector<int64_t> shape;
  uint64_t bytes = 0;
};

// 8 bytes of length, then the JSON header: __metadata__, then the tensors in order; padded so that data starts at a
// multiple of 8.
std::string SafetensorsHeader(const std::vector<TensorHeader>& tensors,
                              const std::map<std::string, std::string>& metadata);

// A whole file; returns its bytes.
absl::StatusOr<uint64_t> WriteSafetensors(const std::string& path, const std::vector<Tensor>& tensors,
                                          const std::map<std::string, std::string>& metadata);

}  // namespace rwkv::rwkvctl
