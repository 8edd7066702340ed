// A model's sizes, read off the names and shapes of its tensors (no config file is needed or trusted).
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/base/dtype.h"
#include "services/checkpoint/checkpoint.h"

namespace rwkv::checkpoint {

struct ModelConfig {
  // Inner widths of a layer's low-rank pairs. Layers may differ.
  struct Ranks {
    int64_t decay = 0;           // Rw: att.w1 [D, Rw], att.w2 [Rw, A]
    int64_t iclr = 0;            // Ra: att.a1, att.a2
    int64_t value_residual = 0;  // Rv: att.v1, att.v2; 0 in layer 0, which has none (or dummies, which are ignored)
    int64_t gate = 0;            // Rg: att.g1, att.g2
  };

  int version = 7;
  int layer_count = 0;                              // L
  int64_t width = 0;                                // D
  int64_t attention_width = 0;                      // A = H * N, width of r, k, v; equals D in every published model
  int64_t head_count = 0;                           // H
  int64_t head_size = 0;                            // N
  int64_t ffn_width = 0;                            // F
  int64_t vocab_size = 0;                           // V
  std::vector<Ranks> ranks;                         // [L]
  bool embedding_is_normalised = false;             // No blocks.0.ln0: the table already holds LN(emb; ln0).
  std::vector<bool> has_initial_state;              // [L], blocks.N.att.time_state is there.
  kernels::DType dtype = kernels::DType::kFloat32;  // Of most weights; a file may mix. For show.
  int64_t parameters = 0;                           // Elements of all tensors that are used.

  // Checks every tensor of every layer: presence, shape, type; and that there is none besides. No weight is read.
  //   kInvalidArgument: not an RWKV model, or a tensor is missing, unknown or of a wrong shape or type; named.
  //   kUnimplemented: another RWKV version or variant, named.
  static absl::StatusOr<ModelConfig> FromCheckpoint(const Checkpoint& checkpoint);
};

}  // namespace rwkv::checkpoint
