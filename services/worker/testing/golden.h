// Golden files: a model's tokens, logits and state as the specification's oracle computed them.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace rwkv::worker {

struct Golden {
  std::vector<uint32_t> tokens;
  std::vector<float> logits;                        // [T, V]
  std::map<std::string, std::vector<float>> state;  // "blocks.0.att.state", ...
};

// STEM.tokens.npy, STEM.logits.npy, STEM.state.safetensors.
absl::StatusOr<Golden> ReadGolden(const std::string& stem);

}  // namespace rwkv::worker
