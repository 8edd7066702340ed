// What all versions share: the way of a step through a stage, and the pieces that every block is made of.
//
//   x = LN(emb[token]; ln0)                                         first stage
//   x = x + TimeMix(LN(x; ln1)),  x = x + ChannelMix(LN(x; ln2))    per layer
//   logits = head LN(x; ln_out)                                     last stage
//
// A version is a subclass that says what a layer's state is and what its two mixes do.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/api/mix_input.h"
#include "kernels/api/op_table.h"
#include "kernels/api/products.h"
#include "kernels/api/sequence_span.h"
#include "kernels/api/state_tensor.h"
#include "kernels/api/step_rows.h"
#include "kernels/base/device.h"
#include "kernels/base/repeating_stream.h"
#include "kernels/base/stream.h"
#include "kernels/base/weight.h"
#include "services/worker/model/block/stage_model.h"
#include "services/worker/model/block/state_layout.h"
#include "services/worker/model/weights.h"

namespace rwkv::worker {

class BlockStage : public StageModel {
 public:
  const StageWeights& weights() const final { return *weights_; }
  const StateLayout& state_layout() const final { return layout_; }
  int64_t v_first_width() const override { return 0; }
  int64_t max_tokens() const override { return 0; }
  absl::Span<const float> InitialState(int stage_layer, int tensor) const override { return {}; }
  absl::Status Forward(const StageStep& step, const StateView& state, kernels::Stream& stream) final;
  absl::Status PrepareSteps(const StageStep& step, int64_t rows, const StateView& state,
                            kernels::RepeatingStream& stream) final;

 protected:
  using Buffer = kernels::DeviceArray<float>;  // [max_rows, a width]
  using Activation = kernels::Activation;
  using Product = kernels::Product;

  // One layer of a step.
  struct LayerStep {
    int layer;  // Counts from the model's first.
    const WeightSet& weights;
    const kernels::StateTensor* state;  // The layer's, as in the layout.
    const StageStep& step;
    const kernels::StepRows& rows;
    kernels::Stream& stream;
  };

  BlockStage(std::shared_ptr<const StageWeights> weights, kernels::Device& device, const StageModelOptions& options,
             StateLayout layout);

  // To be called once, by Create(); subclasses allocate what they add.
  absl::Status AllocateShared(int shifts, int low_ranks);
  absl::Status Allocate(int64_t width, std::initializer_list<Buffer*> buffers) const;

  // What a version does before anything of the step is enqueued, and depends on what its tokens or states are; it may
  // wait. `state` is of all layers.
  virtual absl::Status PrepareStep(const StageStep& step, const StateView& state, kernels::Stream& stream) {
    return absl::OkStatus();
  }
  // What it enqueues before its layers run.
  virtual absl::Status BeginStep(const kernels::StepRows& rows, kernels::Stream& stream) { return absl::OkStatus(); }
  // Each adds its result to step.x.
  virtual absl::Status TimeMix(const LayerStep& at) = 0;
  virtual absl::Status ChannelMix(const LayerStep& at) = 0;

  // The channel mix of RWKV-4, 5 and 6:
  //   x += sigmoid(Wr x_r) * (Wv relu(Wk x_k)^2)
  absl::Status GatedChannelMix(const LayerStep& at, int state_tensor);

  // shifted_[i] = LN(x; norm) mixed with the token before by mixes[i]; the state tensor keeps the last one.
  absl::Status MixInput(const LayerStep& at, Role norm, int state_tensor, std::initializer_list<Role> mixes) const;
  kernels::MixInputArgs MixInputArgs(const LayerStep& at, Role norm, int state_tensor,
                                     std::initializer_list<Role> mixes) const;
  // y = LN(embedding[token]; ln0)
  absl::Status Embed(const int32_t* tokens, int64_t rows, float* y, kernels::Stream& stream) const;
  // Of the step's rows: none reads what another writes.
  absl::Status Products(const LayerStep& at, absl::Span<const Product> products) const;
  // y = act(weight x + bias)
  static Product To(const Buffer& y, const kernels::Weight& weight, const float* x,
                    Activation activation = Activation::kNone, const float* bias = nullptr);
  // step.x += (weight x) * gate
  absl::Status AddProduct(const LayerStep& at, const kernels::Weight& weight, const float* x,
                          const float* gate = nullptr) const;

  const std::shared_ptr<const StageWeights> weights_;
  kernels::Device& device_;
  const kernels::OpTable& ops_;
  const StageModelOptions options_;
  const StateLayout layout_;

  static constexpr int kMaxShifts = 6;
  static constexpr int kMaxLowRanks = 5;
  Buffer normed_;                  // [D]
  Buffer shifted_[kMaxShifts];     // [D]
  Buffer low_rank_[kMaxLowRanks];  // [the largest rank]
  Buffer hidden_;                  // [F]

 private:
  // Whether Forward() repeats such a step.
  bool IsRepeated(const StageStep& step, const kernels::Stream& stream) const;
  // All that the arguments of its operations depend on; of this object's memory.
  absl::Span<const int64_t> KeyOf(const StageStep& padded, const StateView& state);
  // The step with rows of nobody behind its own, `rows` in all, of this object's memory.
  StageStep Pad(const StageStep& step, int64_t rows);
  // Enqueues all of the step; what, depends on the arguments' addresses and sizes alone.
  absl::Status Compute(const StageStep& step, const kernels::StepRows& rows, const StateView& state,
                       kernels::Stream& stream);
  absl::Status Norm(const NormWeights& norm, int64_t rows, const float* x, float* y, kernels::Stream& stream) const;
  // y[i] = LN(x[rows[i]]; ln_out)
  absl::Status FinalNorm(absl::Span<const int64_t> rows, const float* x, float* y, kernels::Stream& stream) const;
  absl::Status Logits(const StageStep& step, kernels::Stream& stream);

  std::unique_ptr<kernels::StepRowsLoader> step_rows_;
  // Of the step being enqueued, where the device repeats steps.
  std::vector<kernels::SequenceSpan> padded_spans_;
  std::vector<int32_t> padded_tokens_;
  std::vector<int64_t> padded_logit_rows_;
  std::vector<int64_t> key_;
};

}  // namespace rwkv::worker
