// The tuned states that a stage offers for sequences to begin with, besides the model's own.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "services/checkpoint/model_config.h"
#include "services/worker/model/layer_range.h"

namespace rwkv::worker {

inline constexpr int kMaxTunedStates = 64;
inline constexpr int kMaxTunedStateNameBytes = 64;

// The wkv state [H, N(value), N(key)] of each layer of the stage.
using TunedState = std::vector<std::vector<float>>;

// By id, "NAME@" and the first 8 hex digits of the file's fingerprint: another file under the same name is another
// state, so that no session goes on from one it did not begin with.
using TunedStates = std::map<std::string, TunedState>;

// Reads the files of `entries`, "NAME=FILE" each, as state tuning writes them, and keeps the stage's layers: in fp32,
// H * N * N * 4 bytes a layer. Errors name the entry; for those of a file see services/checkpoint/initial_state.h.
//   kInvalidArgument: not NAME=FILE, a name given twice or not 1 to 64 of A-Z a-z 0-9 . _ -, more than 64 entries.
absl::StatusOr<TunedStates> LoadTunedStates(absl::Span<const std::string> entries,
                                            const checkpoint::ModelConfig& config, LayerRange layers);

}  // namespace rwkv::worker
