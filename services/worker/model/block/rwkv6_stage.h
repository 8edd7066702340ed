// RWKV-5 ("Eagle": 5.0, 5.1, 5.2) and RWKV-6 ("Finch"): arXiv:2404.05892, BlinkDL/RWKV-LM RWKV-v5/rwkv_v6_demo.py,
// BlinkDL/ChatRWKV rwkv_pip_package model.py.
//
// One recurrence: in RWKV-5 the decay is a constant of the model and the token shift too, RWKV-6 makes both from the
// token. A gate came with 5.1. A layer's state: the last normalised input of either mix and the wkv matrices.
#pragma once

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/base/device.h"
#include "services/worker/model/block/block_stage.h"
#include "services/worker/model/block/stage_model.h"
#include "services/worker/model/weights.h"

namespace rwkv::worker {

class Rwkv6Stage final : public BlockStage {
 public:
  static absl::StatusOr<std::unique_ptr<StageModel>> Create(std::shared_ptr<const StageWeights> weights,
                                                            kernels::Device& device, const StageModelOptions& options);

  absl::Span<const float> InitialState(int stage_layer, int tensor) const override;

 private:
  // Places in the layout.
  static constexpr int kTimeMixShift = 0;     // "att.x_prev" [D]
  static constexpr int kWkv = 1;              // "att.state" [H, N(value), N(key)]
  static constexpr int kChannelMixShift = 2;  // "ffn.x_prev" [D]

  // Places of the time mix's inputs in shifted_.
  enum Shift { kK, kV, kR, kG, kW };

  Rwkv6Stage(std::shared_ptr<const StageWeights> weights, kernels::Device& device, const StageModelOptions& options);

  absl::Status TimeMix(const LayerStep& at) override;
  absl::Status ChannelMix(const LayerStep& at) override;
  // RWKV-6: shifted_[f] by mixes to which up_f tanh(down_f x_x) is added, x_x being shifted by a mix of its own.
  absl::Status DataDependentShift(const LayerStep& at);

  const bool is_6_;
  const bool has_gate_;
  Buffer r_, k_, v_, w_, g_, y_;  // [A]; w in RWKV-6 only, g from 5.1 on, else empty
};

}  // namespace rwkv::worker
