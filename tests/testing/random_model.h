// Random models of every version. They speak nonsense, but every term of the arithmetic matters in their logits: decays
// span slow and fast channels, low-rank branches are far from zero, gates are not saturated, norms are not the identity
// (the scales are those of the specification's oracle, rwkv_random.py).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/dtype.h"
#include "services/checkpoint/model_tensors.h"
#include "tests/testing/checkpoint_writer.h"

namespace rwkv::testing {

struct RandomModelOptions {
  checkpoint::ModelVersion version = checkpoint::ModelVersion::k7;
  int layers = 2;
  int64_t width = 64;           // D
  int64_t attention_width = 0;  // A, a multiple of head_size; 0: D
  int64_t head_size = 32;       // N; not in version 4
  int64_t ffn_width = 0;        // F; 0: 4 D
  int64_t vocab_size = 101;     // V
  int64_t mix_rank = 16;        // RWKV-6
  int64_t decay_rank = 32;      // RWKV-6 and 7
  int64_t iclr_rank = 32;
  int64_t value_residual_rank = 32;
  int64_t gate_rank = 64;
  int64_t deep_embed_width = 6;  // RWKV-7a and 7b
  int64_t query_width = 20;      // RWKV-7b
  int64_t cache_width = 5;       // RWKV-7b
  kernels::DType dtype = kernels::DType::kBFloat16;
  uint64_t seed = 1;
  bool time_state = false;             // With tuned initial states: RWKV-6 and 7.
  bool ln0 = true;                     // Without: the embedding counts as normalised already.
  bool layer0_value_residual = false;  // With the dummies that some trainers leave in layer 0.
  double key_shift = 0;  // Subtracted from what ffn.key gives, on average: more of it is zero behind the squared ReLU.
};

// An element depends on (seed, tensor's name, its index) alone, by integer arithmetic and exact scaling: the same bits
// on every machine, and no change when other tensors come or go. kInvalidArgument: sizes that make no model.
absl::StatusOr<std::vector<RawTensor>> MakeRandomModel(const RandomModelOptions& options);

// Writes a .safetensors, tensor by tensor: memory stays small for any size of model.
absl::Status WriteRandomModel(const RandomModelOptions& options, const std::string& path);

}  // namespace rwkv::testing
