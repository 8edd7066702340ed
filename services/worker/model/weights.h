// The weights of one pipeline stage in the form the blocks compute with, loaded by the device that does it.
//
// Matrices are [out, in] and stay in the file's type, ggml's blocks too: nearly all are views of the mapped file. The
// low-rank pairs are transposed copies where the file holds them as [in, out]. Vectors are widened to fp32 (exact) and
// lie in device memory.
// What tensors there are, and what becomes of each, is told by services/checkpoint/model_tensors.h.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/base/device.h"
#include "kernels/base/matrix.h"
#include "kernels/base/weight.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/model_config.h"
#include "services/checkpoint/model_tensors.h"
#include "services/worker/model/layer_range.h"

namespace rwkv::worker {

using checkpoint::Role;

using DeviceFloats = kernels::DeviceArray<float>;

struct NormWeights {
  DeviceFloats weight;
  DeviceFloats bias;
};

// The tensors of a layer (or of the model itself) by role. A role the version does not have is empty: no elements, or
// a matrix without data.
class WeightSet {
 public:
  const NormWeights& norm(Role role) const { return norms_[static_cast<int>(role)]; }
  const DeviceFloats& vector(Role role) const { return vectors_[static_cast<int>(role)]; }
  const kernels::Weight& matrix(Role role) const { return matrices_[static_cast<int>(role)]; }
  // The low-rank factors of a stack, one by one.
  absl::Span<const kernels::Weight> stack(Role role) const { return stacks_[static_cast<int>(role)]; }
  // Host memory: it is the pool's to copy. Empty: zeros.
  const std::vector<float>& initial_state() const { return initial_state_; }

 private:
  friend class WeightLoader;

  template <typename T>
  using ByRole = std::array<T, static_cast<int>(Role::kCount)>;
  ByRole<NormWeights> norms_;
  ByRole<DeviceFloats> vectors_;
  ByRole<kernels::Weight> matrices_;
  ByRole<std::vector<kernels::Weight>> stacks_;
  std::vector<float> initial_state_;
};

// Immutable after Load, so any thread may read it. Keeps the checkpoint open.
class StageWeights {
 public:
  // Touches the pages of its own layers only; the embedding belongs to the first stage (with DeepEmbed to every stage),
  // ln_out and head to the last. Every weight is read once to see that it is finite: one NaN would silently spoil every
  // answer. In memory there is what the file holds of them once, mapped or copied, vectors twice as large, and what the
  // device makes of a matrix. `device` outlives the weights.
  //   kDataLoss: a weight is NaN or infinite; tensor and index are named. kFailedPrecondition: the config is not this
  //   checkpoint's. kUnimplemented: the device lacks what the model needs; nothing has been read or allocated.
  static absl::StatusOr<std::unique_ptr<const StageWeights>> Load(
      std::shared_ptr<const checkpoint::Checkpoint> checkpoint, const checkpoint::ModelConfig& config,
      LayerRange layers, kernels::Device& device);

  const checkpoint::ModelConfig& config() const { return config_; }
  LayerRange layers() const { return layers_; }
  bool is_first() const { return layers_.begin == 0; }
  bool is_last() const { return layers_.end == config_.layer_count; }

  // `layer` counts from the model's first layer: layers().begin <= layer < layers().end.
  const WeightSet& layer(int layer) const { return layer_weights_[layer - layers_.begin]; }

  // Where the stage embeds tokens. The input of layer 0 is LN(embedding[token]; ln0), or embedding[token] if ln0 is
  // empty.
  const kernels::Weight& embedding() const { return model_.matrix(Role::kEmbedding); }  // [V, D]
  const NormWeights& ln0() const { return model_.norm(Role::kLn0); }

  // Last stage only.
  const NormWeights& ln_out() const { return model_.norm(Role::kLnOut); }     // [D]
  const kernels::Weight& head() const { return model_.matrix(Role::kHead); }  // [V, D]

 private:
  friend class WeightLoader;

  StageWeights(std::shared_ptr<const checkpoint::Checkpoint> checkpoint, const checkpoint::ModelConfig& config,
               LayerRange layers);

  const std::shared_ptr<const checkpoint::Checkpoint> checkpoint_;
  const checkpoint::ModelConfig config_;
  const LayerRange layers_;
  WeightSet model_;
  std::vector<WeightSet> layer_weights_;
};

}  // namespace rwkv::worker
