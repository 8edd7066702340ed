// A model's version and sizes, read off the names and shapes of its tensors (no config file is needed or trusted).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/model_tensors.h"

namespace rwkv::checkpoint {

struct ModelConfig {
  ModelVersion version = ModelVersion::k7;
  int layer_count = 0;                   // L
  int64_t width = 0;                     // D
  int64_t attention_width = 0;           // A, width of r, k, v; equals D in every published model
  int64_t head_count = 0;                // H, A = H * N; 0 in version 4
  int64_t head_size = 0;                 // N; 0 in version 4
  int64_t ffn_width = 0;                 // F
  int64_t vocab_size = 0;                // V
  std::vector<Sizes> layer_sizes;        // [L], the above and the ranks, in which layers may differ
  bool embedding_is_normalised = false;  // No blocks.0.ln0: the table already holds LN(emb; ln0).
  bool has_initial_state = false;        // Some layer has a tuned att.time_state.
  std::string dtype = "fp32";            // Of most weights: fp32, bf16, fp16, int8, int4; a file may mix. For show.
  int64_t parameters = 0;                // Elements of all tensors that are used, without scales.

  std::vector<std::string> ignored;  // Tensors that are no part of the model.

  // Checks every tensor of every layer: presence, shape, type; and that there is none besides, but for those that known
  // trainers leave (`ignored`), or with ignore_extra_tensors any. No weight is read.
  //   kInvalidArgument: not an RWKV model, or a tensor is missing, unknown or of a wrong shape or type; named.
  //   kUnimplemented: an RWKV version or variant that is not served, named.
  static absl::StatusOr<ModelConfig> FromCheckpoint(const Checkpoint& checkpoint, bool ignore_extra_tensors = false);
};

// What a user should know of how the model was read, a sentence each: the checkpoint's notes and the ignored tensors.
std::vector<std::string> Notes(const Checkpoint& checkpoint, const ModelConfig& config);

}  // namespace rwkv::checkpoint
