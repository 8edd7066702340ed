#include "services/worker/model/block/rwkv6_stage.h"

#include <utility>

#include "kernels/api/mix_input.h"
#include "kernels/api/wkv6.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/model_config.h"
#include "services/checkpoint/model_tensors.h"

namespace rwkv::worker {
namespace {

using checkpoint::ModelVersion;

StateLayout LayoutOf(const checkpoint::ModelConfig& config) {
  return StateLayout({{"att.x_prev", {config.width}},
                      {"att.state", {config.head_count, config.head_size, config.head_size}},
                      {"ffn.x_prev", {config.width}}});
}

}  // namespace

absl::StatusOr<std::unique_ptr<StageModel>> Rwkv6Stage::Create(std::shared_ptr<const StageWeights> weights,
                                                               kernels::Device& device,
                                                               const StageModelOptions& options) {
  std::unique_ptr<Rwkv6Stage> stage(new Rwkv6Stage(std::move(weights), device, options));
  RWKV_RETURN_IF_ERROR(stage->AllocateShared(stage->is_6_ ? 6 : 4, stage->is_6_ ? 5 : 0));
  const int64_t width = stage->weights_->config().attention_width;
  RWKV_RETURN_IF_ERROR(stage->Allocate(width, {&stage->r_, &stage->k_, &stage->v_, &stage->y_}));
  if (stage->has_gate_) RWKV_RETURN_IF_ERROR(stage->Allocate(width, {&stage->g_}));
  if (stage->is_6_) RWKV_RETURN_IF_ERROR(stage->Allocate(width, {&stage->w_}));
  return absl::StatusOr<std::unique_ptr<StageModel>>(std::move(stage));
}

Rwkv6Stage::Rwkv6Stage(std::shared_ptr<const StageWeights> weights, kernels::Device& device,
                       const StageModelOptions& options)
    : BlockStage(weights, device, options, LayoutOf(weights->config())),
      is_6_(weights->config().version == ModelVersion::k6),
      has_gate_(weights->config().version != ModelVersion::k5_0) {}

absl::Span<const float> Rwkv6Stage::InitialState(int stage_layer, int tensor) const {
  if (tensor != kWkv) return {};
  return weights_->layer(weights_->layers().begin + stage_layer).initial_state();
}

absl::Status Rwkv6Stage::DataDependentShift(const LayerStep& at) {
  const absl::Span<const kernels::Weight> down = at.weights.stack(Role::kShiftDown);
  const absl::Span<const kernels::Weight> up = at.weights.stack(Role::kShiftUp);
  constexpr int kX = 5;
  kernels::MixInputArgs first = MixInputArgs(at, Role::kLn1, kTimeMixShift, {Role::kShiftX});
  first.y[0] = shifted_[kX].data();
  first.normed = normed_.data();
  first.keep_state = true;
  RWKV_RETURN_IF_ERROR(ops_.mix_input(first, at.stream));
  constexpr Shift kStack[] = {kW, kK, kV, kR, kG};  // As they lie in the file.
  Product products[5];
  for (int i = 0; i < 5; ++i) products[i] = To(low_rank_[i], down[i], shifted_[kX].data(), Activation::kTanh);
  RWKV_RETURN_IF_ERROR(Products(at, products));
  for (int i = 0; i < 5; ++i) products[i] = To(shifted_[kStack[i]], up[i], low_rank_[i].data());
  RWKV_RETURN_IF_ERROR(Products(at, products));
  kernels::MixInputArgs second = MixInputArgs(
      at, Role::kLn1, kTimeMixShift, {Role::kShiftK, Role::kShiftV, Role::kShiftR, Role::kShiftG, Role::kShiftW});
  second.x = normed_.data();
  second.weight = second.bias = nullptr;
  for (int i = 0; i < 5; ++i) second.mix_delta[i] = second.y[i];
  return ops_.mix_input(second, at.stream);
}

absl::Status Rwkv6Stage::TimeMix(const LayerStep& at) {
  const checkpoint::ModelConfig& config = weights_->config();
  const WeightSet& w = at.weights;
  if (is_6_) {
    RWKV_RETURN_IF_ERROR(DataDependentShift(at));
  } else if (has_gate_) {
    RWKV_RETURN_IF_ERROR(
        MixInput(at, Role::kLn1, kTimeMixShift, {Role::kShiftK, Role::kShiftV, Role::kShiftR, Role::kShiftG}));
  } else {
    RWKV_RETURN_IF_ERROR(MixInput(at, Role::kLn1, kTimeMixShift, {Role::kShiftK, Role::kShiftV, Role::kShiftR}));
  }
  // The gate and the decay come last, because not every version has them.
  const Product products[] = {To(k_, w.matrix(Role::kKey), shifted_[kK].data()),
                              To(v_, w.matrix(Role::kValue), shifted_[kV].data()),
                              To(r_, w.matrix(Role::kReceptance), shifted_[kR].data()),
                              To(g_, w.matrix(Role::kGate), shifted_[kG].data(), Activation::kSilu),
                              To(low_rank_[0], w.matrix(Role::kDecayDown), shifted_[kW].data(), Activation::kTanh)};
  RWKV_RETURN_IF_ERROR(Products(at, absl::MakeConstSpan(products).first(is_6_ ? 5 : has_gate_ ? 4 : 3)));
  if (is_6_) {
    RWKV_RETURN_IF_ERROR(Products(at, {To(w_, w.matrix(Role::kDecayUp), low_rank_[0].data(), Activation::kDecay,
                                          w.vector(Role::kDecay).data())}));
  }
  kernels::Wkv6Args args;
  args.step = &at.rows;
  args.heads = config.head_count;
  args.head_size = config.head_size;
  args.state = at.state[kWkv];
  args.bonus = w.vector(Role::kBonus).data();
  args.ln_weight = w.norm(Role::kLnX).weight.data();
  args.ln_bias = w.norm(Role::kLnX).bias.data();
  args.epsilon = options_.group_norm_epsilon;
  args.r = r_.data();
  args.w = is_6_ ? w_.data() : w.vector(Role::kDecay).data();
  args.constant_decay = !is_6_;
  args.k = k_.data();
  args.v = v_.data();
  args.gate = g_.data();
  args.y = y_.data();
  RWKV_RETURN_IF_ERROR(ops_.wkv6(args, at.stream));
  return AddProduct(at, w.matrix(Role::kOutput), y_.data());
}

absl::Status Rwkv6Stage::ChannelMix(const LayerStep& at) { return GatedChannelMix(at, kChannelMixShift); }

}  // namespace rwkv::worker
