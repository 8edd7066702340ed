// The .st files of web-rwkv, Ai00 and RWKV-Runner: safetensors whose names and layouts differ from the original ones.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {

// Told by what no original file has: RWKV-6 with time_mix_w1; RWKV-7 with a low-rank factor w1, a1, v1 or g1 that is
// [rank, D] and none that is [D, rank]; RWKV-5.2 with time_first of [H, N]. (RWKV-4 is the same in both. Where every
// factor of an RWKV-7 is square, the file counts as original.)
bool LooksLikeWebRwkv(const std::vector<TensorRecord>& records);

// Renames (time_mix is time_maa in RWKV-6, time_first is time_faaaa from 5.2 on: no exp), and transposes the low-rank
// factors and time_state. kInvalidArgument: a factor with too few dimensions.
absl::Status WebRwkvToOriginal(std::vector<TensorRecord>* records);

}  // namespace rwkv::checkpoint
