// A loaded model as the other services see it.
#pragma once

#include "absl/status/statusor.h"
#include "rwkv/v1/common.pb.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/model_config.h"

namespace rwkv::worker {

// Named after its file, without folder and extension. The vocabulary's size tells the tokenizer: 65,536 is "world",
// 50,277 and 50,304 are "neox" (Pile, Raven).
// Computes the fingerprint, which reads parts of the whole file: call it once.
absl::StatusOr<v1::ModelInfo> MakeModelInfo(const checkpoint::Checkpoint& checkpoint,
                                            const checkpoint::ModelConfig& config);

}  // namespace rwkv::worker
