// RWKV-7 ("Goose"): layers as in arXiv:2503.14456 and BlinkDL/RWKV-LM RWKV-v7/rwkv_v7_demo_rnn.py.
//
// A layer's state: the last normalised input of either mix and the wkv matrices. v_first, the value of layer 0, is an
// activation: later layers blend it in, so it crosses stages beside x.
//
// RWKV-7a ("DeepEmbed", RWKV-v7/rwkv_v7a_demo.py) gates the channel mix's hidden units by a small matrix of the token's
// own. RWKV-7b (rwkv_v7b_demo.py) adds an attention over all tokens so far, which reads a short cached row of each:
//   x = x + TimeMix(LN(x; ln1)) + Attention(x)
// Its caches hold a fixed number of tokens and are part of the state; for want of room a longer sequence is refused.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/api/step_rows.h"
#include "kernels/base/device.h"
#include "kernels/base/stream.h"
#include "services/worker/model/block/block_stage.h"
#include "services/worker/model/block/merged_table.h"
#include "services/worker/model/block/stage_model.h"
#include "services/worker/model/block/state_layout.h"
#include "services/worker/model/weights.h"

namespace rwkv::worker {

class Rwkv7Stage final : public BlockStage {
 public:
  static absl::StatusOr<std::unique_ptr<StageModel>> Create(std::shared_ptr<const StageWeights> weights,
                                                            kernels::Device& device, const StageModelOptions& options);

  int64_t v_first_width() const override { return weights_->config().attention_width; }
  int64_t max_tokens() const override { return has_attention_ ? options_.deep_embed_context : 0; }
  absl::Span<const float> InitialState(int stage_layer, int tensor) const override;
  bool Waits() const override { return has_attention_; }

 private:
  // Places in the layout.
  static constexpr int kTimeMixShift = 0;     // "att.x_prev" [D]
  static constexpr int kWkv = 1;              // "att.state" [H, N(value), N(key)]
  static constexpr int kChannelMixShift = 2;  // "ffn.x_prev" [D]
  static constexpr int kLength = 3;           // "qkv.length" [1], RWKV-7b only as what follows
  static constexpr int kTokenCache = 4;       // "qkv.tokens" [tokens]
  static constexpr int kKeyCache = 5;         // "qkv.k_cache" [tokens, cache width]
  static constexpr int kValueCache = 6;       // "qkv.v_cache" [tokens, cache width]
  static constexpr int kLastQuery = 7;        // "qkv.q_prev" [query width]

  Rwkv7Stage(std::shared_ptr<const StageWeights> weights, kernels::Device& device, const StageModelOptions& options);

  absl::Status TimeMix(const LayerStep& at) override;
  absl::Status ChannelMix(const LayerStep& at) override;

  absl::Status AllocateDeepEmbed();
  absl::Status PrepareStep(const StageStep& step, const StateView& state, kernels::Stream& stream) override;
  absl::Status BeginStep(const kernels::StepRows& rows, kernels::Stream& stream) override;
  // Makes what rows of the merged tables the step needs and does not find.
  absl::Status MakeRows(const StageStep& step, const StateView& state, kernels::Stream& stream);
  // hidden_ = key * (y s2 + s0), y being (normed_ s1) times the token's own matrix
  absl::Status GatedKey(const LayerStep& at, const Product& key);
  // step.x += Attention(step.x)
  absl::Status AddAttention(const LayerStep& at);

  const bool has_deep_embed_;
  const bool has_attention_;
  Buffer r_, k_, v_, decay_, iclr_, gate_, value_gate_, y_;  // [A]

  // DeepEmbed only.
  Buffer embedded_;         // [D], the tokens' rows of the embedding
  Buffer token_matrix_;     // [n * n], n the largest DeepEmbed width
  Buffer deep_x_, deep_y_;  // [n]

  // Attention only.
  struct Tables {
    MergedTable key, value;
  };
  std::vector<Tables> tables_;                      // By layer of the stage.
  std::vector<bool> has_row_;                       // [V], in all tables.
  std::vector<int32_t> missing_;                    // Ids to make.
  kernels::DeviceArray<int32_t> pinned_ids_, ids_;  // [max_rows] of them at a time
  Buffer pinned_lengths_;                           // [max_rows], by span
  Buffer pinned_cache_;                             // [deep_embed_context]
  Buffer made_;                                     // [the wider of the tables]
  Buffer query_;                                    // [query width]
  Buffer cache_key_, cache_value_;                  // [cache width]
};

}  // namespace rwkv::worker
