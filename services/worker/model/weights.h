// The weights of one pipeline stage in the form the blocks compute with.
//
// Matrices are [out, in] and stay in the file's type, ggml's blocks too: nearly all are views of the mapped file. The
// low-rank pairs are transposed copies where the file holds them as [in, out]. Vectors are widened to fp32 (exact).
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
#include "kernels/base/matrix.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/model_config.h"
#include "services/checkpoint/model_tensors.h"
#include "services/worker/model/layer_range.h"

namespace rwkv::worker {

using checkpoint::Role;

struct NormWeights {
  std::vector<float> weight;
  std::vector<float> bias;
};

// The tensors of a layer (or of the model itself) by role. A role the version does not have is empty: no elements, or
// a matrix without data.
class WeightSet {
 public:
  const NormWeights& norm(Role role) const { return norms_[static_cast<int>(role)]; }
  const std::vector<float>& vector(Role role) const { return vectors_[static_cast<int>(role)]; }
  // A stack of n low-rank factors is one matrix with the factors below each other.
  const kernels::MatrixView& matrix(Role role) const { return matrices_[static_cast<int>(role)]; }

 private:
  friend class StageWeights;

  template <typename T>
  using ByRole = std::array<T, static_cast<int>(Role::kCount)>;
  ByRole<NormWeights> norms_;
  ByRole<std::vector<float>> vectors_;
  ByRole<kernels::MatrixView> matrices_;
};

// Immutable after Load, so any thread may read it. Keeps the checkpoint open.
class StageWeights {
 public:
  // Touches the pages of its own layers only; the embedding belongs to the first stage (with DeepEmbed to every stage),
  // ln_out and head to the last. Every weight is read once to see that it is finite: one NaN would silently spoil every
  // answer. In memory there is what the file holds of them once, mapped or copied, and vectors twice as large.
  //   kDataLoss: a weight is NaN or infinite; tensor and index are named. kFailedPrecondition: the config is not this
  //   checkpoint's.
  static absl::StatusOr<std::unique_ptr<const StageWeights>> Load(
      std::shared_ptr<const checkpoint::Checkpoint> checkpoint, const checkpoint::ModelConfig& config,
      LayerRange layers);

  const checkpoint::ModelConfig& config() const { return config_; }
  LayerRange layers() const { return layers_; }
  bool is_first() const { return layers_.begin == 0; }
  bool is_last() const { return layers_.end == config_.layer_count; }

  // `layer` counts from the model's first layer: layers().begin <= layer < layers().end.
  const WeightSet& layer(int layer) const { return layer_weights_[layer - layers_.begin]; }

  // Where the stage embeds tokens. The input of layer 0 is LN(embedding[token]; ln0), or embedding[token] if ln0 is
  // empty.
  const kernels::MatrixView& embedding() const { return model_.matrix(Role::kEmbedding); }  // [V, D]
  const NormWeights& ln0() const { return model_.norm(Role::kLn0); }

  // Last stage only.
  const NormWeights& ln_out() const { return model_.norm(Role::kLnOut); }         // [D]
  const kernels::MatrixView& head() const { return model_.matrix(Role::kHead); }  // [V, D]

 private:
  StageWeights(std::shared_ptr<const checkpoint::Checkpoint> checkpoint, const checkpoint::ModelConfig& config,
               LayerRange layers);

  absl::Status LoadAll();
  bool Wants(Role role) const;  // Of the model's own tensors.
  absl::Status LoadTensor(const checkpoint::ModelTensor& spec, absl::string_view prefix, const checkpoint::Sizes& sizes,
                          WeightSet* weights);
  absl::Status LoadVector(const checkpoint::ModelTensor& spec, const std::string& name, const checkpoint::Sizes& sizes,
                          std::vector<float>* out);
  // `form` is the one in which the tensor's rows follow each other as [rows, cols].
  absl::Status LoadMatrix(const std::string& name, int64_t rows, int64_t cols, checkpoint::Form form,
                          kernels::MatrixView* out);
  // Codes of which `out` has the data and the sizes.
  absl::Status LoadQuantized(const checkpoint::TensorInfo& info, int64_t rows, int64_t cols, kernels::MatrixView* out);
  // Scales or minimums of a quantised matrix.
  absl::Status LoadGroups(const std::string& name, int64_t rows, int64_t cols, int64_t* group, const uint16_t** out);

  const std::shared_ptr<const checkpoint::Checkpoint> checkpoint_;
  const checkpoint::ModelConfig config_;
  const LayerRange layers_;
  WeightSet model_;
  std::vector<WeightSet> layer_weights_;
};

}  // namespace rwkv::worker
