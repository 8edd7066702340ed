// Names of Hugging Face ports to the original ones: fla's RWKV-7 (and RWKV-6), and the ports of RWKV-4, 5 and 6.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {

// Told by "layers.N.attn." (fla) or "blocks.N.attention." (the other ports). Names come without "model.".
bool LooksLikeHuggingFace(const std::vector<TensorRecord>& records);

// Renames; fla's low-rank factors transposed.
//   kUnimplemented: fla's RWKV-6, whose token shifts are in another order. kInvalidArgument: a factor that is no
//   matrix.
absl::Status HuggingFaceToOriginal(std::vector<TensorRecord>* records);

}  // namespace rwkv::checkpoint
