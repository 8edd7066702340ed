// GGUF's names and layouts of RWKV-6 and RWKV-7 to the original ones.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {

// Renames; low-rank factors transposed, fused token shifts split, r_k given its heads, layer 0's dummies dropped, and
// the halving that a converter of RWKV-6 did for a run time that rescales taken back (exact: powers of two). Tensors of
// unknown names keep them. `metadata` is the file's.
//   kUnimplemented: another architecture. kInvalidArgument: a shape or key that cannot be one of an RWKV's.
absl::Status GgufToOriginal(const std::map<std::string, std::string>& metadata, std::vector<TensorRecord>* records);

// The bytes of every token by id, empty for those that stand for none (the control token 0 and padding).
// `types` is empty or as long as `tokens`.
//   kUnimplemented: a tokenizer other than "rwkv". kInvalidArgument: a text that does not unescape.
absl::StatusOr<std::vector<std::string>> GgufVocabulary(const std::map<std::string, std::string>& metadata,
                                                        absl::Span<const absl::string_view> tokens,
                                                        absl::Span<const int32_t> types);

}  // namespace rwkv::checkpoint
