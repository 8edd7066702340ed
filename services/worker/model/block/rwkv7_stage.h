// RWKV-7 ("Goose"): layers as in arXiv:2503.14456 and BlinkDL/RWKV-LM RWKV-v7/rwkv_v7_demo_rnn.py.
//
//   x = LN(emb[token]; ln0)                             first stage
//   x = x + TimeMix(LN(x; ln1)),  x = x + ChannelMix(LN(x; ln2))    per layer
//   logits = head LN(x; ln_out)                         last stage
//
// A layer's state: the last normalised input of either mix and the wkv matrices. v_first, the value of layer 0, is an
// activation: later layers blend it in, so it crosses stages beside x.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/api/op_table.h"
#include "kernels/base/aligned_buffer.h"
#include "kernels/base/stream.h"
#include "services/worker/model/block/stage_model.h"
#include "services/worker/model/block/state_layout.h"
#include "services/worker/model/weights.h"

namespace rwkv::worker {

class Rwkv7Stage final : public StageModel {
 public:
  static absl::StatusOr<std::unique_ptr<StageModel>> Create(std::shared_ptr<const StageWeights> weights,
                                                            const kernels::OpTable& ops, int64_t max_rows);

  const StageWeights& weights() const override { return *weights_; }
  const StateLayout& state_layout() const override { return layout_; }
  int64_t v_first_width() const override { return weights_->config().attention_width; }
  absl::Span<const float> InitialState(int stage_layer, int tensor) const override;
  absl::Status Forward(const StageStep& step, const StateView& state, kernels::Stream& stream) override;

 private:
  // Places in the layout.
  static constexpr int kTimeMixShift = 0;     // "att.x_prev" [D]
  static constexpr int kWkv = 1;              // "att.state" [H, N(value), N(key)]
  static constexpr int kChannelMixShift = 2;  // "ffn.x_prev" [D]
  static constexpr int kShifted = 6;          // r, w, k, v, a, g

  // Activations of one step, [max_rows, width of each].
  struct Activations {
    kernels::AlignedBuffer<float> normed;               // D
    kernels::AlignedBuffer<float> shifted[kShifted];    // D
    kernels::AlignedBuffer<float> r, k, v, w, a, b, g;  // A
    kernels::AlignedBuffer<float> value_gate, y;        // A
    kernels::AlignedBuffer<float> low_rank;             // The largest rank.
    kernels::AlignedBuffer<float> ffn_hidden;           // F
  };

  Rwkv7Stage(std::shared_ptr<const StageWeights> weights, const kernels::OpTable& ops, int64_t max_rows);

  absl::Status Allocate();
  absl::Status TimeMix(int layer, const StageStep& step, const StateView& state, kernels::Stream& stream);
  absl::Status ChannelMix(int layer, const StageStep& step, const StateView& state, kernels::Stream& stream);
  absl::Status Logits(const StageStep& step, kernels::Stream& stream);

  absl::Status Norm(const NormWeights& norm, int64_t rows, const float* x, float* y, kernels::Stream& stream) const;
  absl::Status Matmul(const kernels::MatrixView& weight, int64_t rows, const float* x, float* y,
                      kernels::Activation activation, bool accumulate, kernels::Stream& stream) const;
  // y = second(act(first(x)))
  absl::Status LowRank(const kernels::MatrixView& first, kernels::Activation activation,
                       const kernels::MatrixView& second, int64_t rows, const float* x, float* y,
                       kernels::Stream& stream);

  const std::shared_ptr<const StageWeights> weights_;
  const kernels::OpTable& ops_;
  const int64_t max_rows_;
  const StateLayout layout_;
  Activations act_;
};

}  // namespace rwkv::worker
