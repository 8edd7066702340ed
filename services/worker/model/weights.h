// The weights of one pipeline stage in the form the blocks compute with.
//
// Matrices are [out, in] and stay in the file's type. The big ones are views of the mapped file; the low-rank pairs,
// which files hold as [in, out], are transposed into memory of their own. Vectors are widened to fp32 (exact).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/matrix.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/model_config.h"
#include "services/worker/model/layer_range.h"

namespace rwkv::worker {

struct NormWeights {
  std::vector<float> weight;
  std::vector<float> bias;
};

struct LayerWeights {
  // Time mix.
  NormWeights ln1;                                  // [D]
  std::vector<float> x_r, x_w, x_k, x_v, x_a, x_g;  // [D], token shift
  kernels::MatrixView receptance, key, value;       // [A, D]
  kernels::MatrixView output;                       // [D, A]
  std::vector<float> w0;                            // [A], decay
  kernels::MatrixView w1, w2;                       // [Rw, D], [A, Rw]: transposed from the file
  std::vector<float> a0;                            // [A], in-context learning rate
  kernels::MatrixView a1, a2;                       // [Ra, D], [A, Ra]
  std::vector<float> v0;                            // [A], value residual; empty in layer 0
  kernels::MatrixView v1, v2;                       // [Rv, D], [A, Rv]; no data in layer 0
  kernels::MatrixView g1, g2;                       // [Rg, D], [A, Rg], gate
  std::vector<float> k_k, k_a;                      // [A]
  std::vector<float> r_k;                           // [H, N], bonus
  NormWeights ln_x;                                 // [A], group norm
  std::vector<float> initial_state;                 // [H, N(value), N(key)]; empty: zero

  // Channel mix.
  NormWeights ln2;                // [D]
  std::vector<float> ffn_x_k;     // [D]
  kernels::MatrixView ffn_key;    // [F, D]
  kernels::MatrixView ffn_value;  // [D, F]
};

// Immutable after Load, so any thread may read it. Keeps the checkpoint open.
class StageWeights {
 public:
  // Touches the pages of its own layers only; the embedding belongs to the first stage, ln_out and head to the last.
  // Every weight is read once to see that it is finite: one NaN would silently spoil every answer.
  //   kDataLoss: a weight is NaN or infinite; tensor and index are named.
  static absl::StatusOr<std::unique_ptr<const StageWeights>> Load(
      std::shared_ptr<const checkpoint::Checkpoint> checkpoint, const checkpoint::ModelConfig& config,
      LayerRange layers);

  const checkpoint::ModelConfig& config() const { return config_; }
  LayerRange layers() const { return layers_; }
  bool is_first() const { return layers_.begin == 0; }
  bool is_last() const { return layers_.end == config_.layer_count; }

  // `layer` counts from the model's first layer: layers().begin <= layer < layers().end.
  const LayerWeights& layer(int layer) const { return layer_weights_[layer - layers_.begin]; }

  // First stage only. The input of layer 0 is LN(embedding[token]; ln0), or embedding[token] if ln0 is empty.
  const kernels::MatrixView& embedding() const { return embedding_; }  // [V, D]
  const NormWeights& ln0() const { return ln0_; }

  // Last stage only.
  const NormWeights& ln_out() const { return ln_out_; }      // [D]
  const kernels::MatrixView& head() const { return head_; }  // [V, D]

 private:
  StageWeights(std::shared_ptr<const checkpoint::Checkpoint> checkpoint, const checkpoint::ModelConfig& config,
               LayerRange layers);

  absl::Status LoadAll();
  absl::Status LoadLayer(int layer, LayerWeights* weights);
  absl::Status LoadVector(const std::string& name, int64_t size, std::vector<float>* out);
  absl::Status LoadNorm(const std::string& prefix, int64_t size, NormWeights* out);
  absl::Status LoadMatrix(const std::string& name, int64_t rows, int64_t cols, kernels::MatrixView* out);
  // The file's tensor is [cols, rows].
  absl::Status LoadTransposed(const std::string& name, int64_t rows, int64_t cols, kernels::MatrixView* out);

  const std::shared_ptr<const checkpoint::Checkpoint> checkpoint_;
  const checkpoint::ModelConfig config_;
  const LayerRange layers_;
  std::vector<LayerWeights> layer_weights_;
  kernels::MatrixView embedding_;
  NormWeights ln0_;
  NormWeights ln_out_;
  kernels::MatrixView head_;
  std::vector<std::unique_ptr<uint8_t[]>> transposed_;  // Memory of the low-rank matrices.
};

}  // namespace rwkv::worker
