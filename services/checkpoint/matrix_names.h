// Which tensors are the large matrices.
#pragma once

#include "absl/strings/string_view.h"

namespace rwkv::checkpoint {

// Whether `name`, an original one, is of a matrix [out, in] that every token is multiplied by, which is what is worth
// quantizing: blocks.N.att.*.weight and blocks.N.ffn.*.weight but norms and DeepEmbed's tables, and head.weight.
bool IsMultipliedMatrix(absl::string_view name);

}  // namespace rwkv::checkpoint
