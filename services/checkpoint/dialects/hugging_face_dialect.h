// Names of Hugging Face ports to the original ones: fla's RWKV-6 and 7, and the ports of RWKV-4, 5 and 6.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {

// Told by "layers.N.attn." or "layers.N.ffn." (fla), "blocks.N.attention." or "blocks.N.feed_forward." (the other
// ports, also with "layers."). Names come without "model.".
bool LooksLikeHuggingFace(const std::vector<TensorRecord>& records);

// Renames, also what a trainer hangs behind a module's name. fla's low-rank factors are transposed; its RWKV-6 has the
// parts for r, w, k, v and g in this order where the original has w, k, v, r, g; its first RWKV-7 had the mixes of one
// layer in a single tensor, x_x. (fla's own code gives ln_x of an RWKV-6 the epsilon 1e-5 of its config.json, which no
// tensor tells: the worker's --group_norm_eps.)
//   kInvalidArgument: a tensor of a shape that no such part has.
absl::Status HuggingFaceToOriginal(std::vector<TensorRecord>* records);

}  // namespace rwkv::checkpoint
