// RWKV-4 (Pile, Raven, World): layers as in BlinkDL/ChatRWKV RWKV_in_150_lines.py.
//
// A layer's state: the last normalised input of either mix, and of each channel the numerator and denominator of a
// weighted mean with their common exponent.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/base/device.h"
#include "services/worker/model/block/block_stage.h"
#include "services/worker/model/block/stage_model.h"
#include "services/worker/model/weights.h"

namespace rwkv::worker {

class Rwkv4Stage final : public BlockStage {
 public:
  static absl::StatusOr<std::unique_ptr<StageModel>> Create(std::shared_ptr<const StageWeights> weights,
                                                            kernels::Device& device, const StageModelOptions& options);

  absl::Span<const float> InitialState(int stage_layer, int tensor) const override;

 private:
  // Places in the layout.
  static constexpr int kTimeMixShift = 0;     // "att.x_prev" [D]
  static constexpr int kNumerator = 1;        // "att.aa" [A]
  static constexpr int kDenominator = 2;      // "att.bb" [A]
  static constexpr int kExponent = 3;         // "att.pp" [A]
  static constexpr int kChannelMixShift = 4;  // "ffn.x_prev" [D]

  Rwkv4Stage(std::shared_ptr<const StageWeights> weights, kernels::Device& device, const StageModelOptions& options);

  absl::Status TimeMix(const LayerStep& at) override;
  absl::Status ChannelMix(const LayerStep& at) override;

  const std::vector<float> no_exponent_;  // [A], what stands for minus infinity
  Buffer r_, k_, v_;                      // [A]
};

}  // namespace rwkv::worker
