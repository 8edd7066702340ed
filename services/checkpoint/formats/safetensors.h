// The safetensors container: u64 N, N bytes of JSON that name every tensor, then their bytes.
// Format: github.com/huggingface/safetensors README, "Format".
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {

constexpr int64_t kMaxSafetensorsHeaderBytes = 100'000'000;  // The format's own limit.
constexpr int kMaxSafetensorsMetadata = 4096;                // Entries of __metadata__.

struct SafetensorsDirectory {
  std::vector<TensorRecord> tensors;  // In file order of their data.
  std::map<std::string, std::string> metadata;
};

// `file` is the whole file; only its header is touched. As the format demands, the tensors must cover the payload
// without overlap and without holes.
//   kDataLoss: the file ends before its header or a tensor does.
//   kInvalidArgument: anything else that contradicts the format.
absl::StatusOr<SafetensorsDirectory> ReadSafetensors(absl::Span<const uint8_t> file);

// "F32", "BF16", ...: what the format calls the type.
absl::string_view SafetensorsName(ElementType type);

}  // namespace rwkv::checkpoint
