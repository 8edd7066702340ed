// The GGUF container of llama.cpp, versions 2 and 3: magic, counts, typed keys, a directory of tensors, then their
// bytes. Format: ggml-org/ggml docs/gguf.md.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {

constexpr uint64_t kMaxGgufHeaderBytes = 100'000'000;  // Everything before the tensors' bytes.
constexpr uint64_t kMaxGgufKeys = 4096;
constexpr uint64_t kMaxGgufTextBytes = 1 << 20;  // Of one key or text.
constexpr uint64_t kMaxGgufTokens = 1 << 20;

struct GgufDirectory {
  std::vector<TensorRecord> tensors;            // With GGUF's names; shapes as PyTorch has them, [out, in].
  std::map<std::string, std::string> metadata;  // Numbers, booleans and texts, printed. Arrays are left out, but for:
  std::vector<absl::string_view> tokens;        // tokenizer.ggml.tokens as they stand; views of the file.
  std::vector<int32_t> token_types;             // tokenizer.ggml.token_type: none, or as many as tokens.
};

// `file` is the whole file; only its header is touched. Tensors lie in the file, aligned, and do not overlap.
//   kDataLoss: the file ends before its header or a tensor does.
//   kUnimplemented: another version or byte order, or a tensor of a ggml type that is not read; named.
//   kInvalidArgument: anything else that contradicts the format.
absl::StatusOr<GgufDirectory> ReadGguf(absl::Span<const uint8_t> file);

}  // namespace rwkv::checkpoint
