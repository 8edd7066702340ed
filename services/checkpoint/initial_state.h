// Tuned initial states of a model, in a file of their own.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/model_config.h"

namespace rwkv::checkpoint {

// The wkv states [H, N(value), N(key)] of layers begin .. end - 1 that a session starts from instead of zeros. The file
// holds blocks.N.att.time_state of every layer of the model and nothing else, as state tuning writes it: this order of
// value and key, for RWKV-5, 6 and 7 alike (the pip package's runtime states of RWKV-5 and 6 are the other way round).
//   kInvalidArgument: a state is missing, of a wrong shape or type, or of a layer that the model has not; another
//   tensor. kFailedPrecondition: the model is one without matrix states (RWKV-4). kDataLoss: NaN or infinite.
absl::StatusOr<std::vector<std::vector<float>>> LoadInitialStates(const Checkpoint& checkpoint,
                                                                  const ModelConfig& config, int begin, int end);

}  // namespace rwkv::checkpoint
