#include "services/worker/model/block/rwkv4_stage.h"

#include <utility>

#include "kernels/api/wkv4.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/model_config.h"

namespace rwkv::worker {
namespace {

StateLayout LayoutOf(const checkpoint::ModelConfig& config) {
  return StateLayout({{"att.x_prev", {config.width}},
                      {"att.aa", {config.attention_width}},
                      {"att.bb", {config.attention_width}},
                      {"att.pp", {config.attention_width}},
                      {"ffn.x_prev", {config.width}}});
}

}  // namespace

absl::StatusOr<std::unique_ptr<StageModel>> Rwkv4Stage::Create(std::shared_ptr<const StageWeights> weights,
                                                               kernels::Device& device,
                                                               const StageModelOptions& options) {
  std::unique_ptr<Rwkv4Stage> stage(new Rwkv4Stage(std::move(weights), device, options));
  RWKV_RETURN_IF_ERROR(stage->AllocateShared(3, 0));
  RWKV_RETURN_IF_ERROR(
      stage->Allocate(stage->weights_->config().attention_width, {&stage->r_, &stage->k_, &stage->v_}));
  return absl::StatusOr<std::unique_ptr<StageModel>>(std::move(stage));
}

Rwkv4Stage::Rwkv4Stage(std::shared_ptr<const StageWeights> weights, kernels::Device& device,
                       const StageModelOptions& options)
    : BlockStage(weights, device, options, LayoutOf(weights->config())),
      no_exponent_(weights->config().attention_width, -1e30f) {}

absl::Span<const float> Rwkv4Stage::InitialState(int stage_layer, int tensor) const {
  if (tensor != kExponent) return {};
  return no_exponent_;
}

absl::Status Rwkv4Stage::TimeMix(const LayerStep& at) {
  const WeightSet& w = at.weights;
  RWKV_RETURN_IF_ERROR(MixInput(at, Role::kLn1, kTimeMixShift, {Role::kShiftK, Role::kShiftV, Role::kShiftR}));
  RWKV_RETURN_IF_ERROR(Products(
      at, {To(k_, w.matrix(Role::kKey), shifted_[0].data()), To(v_, w.matrix(Role::kValue), shifted_[1].data()),
           To(r_, w.matrix(Role::kReceptance), shifted_[2].data(), Activation::kSigmoid)}));
  kernels::Wkv4Args args;
  args.step = &at.rows;
  args.width = weights_->config().attention_width;
  args.aa = at.state[kNumerator];
  args.bb = at.state[kDenominator];
  args.pp = at.state[kExponent];
  args.decay = w.vector(Role::kDecay).data();
  args.bonus = w.vector(Role::kBonus).data();
  args.r = r_.data();
  args.k = k_.data();
  args.v = v_.data();
  args.y = r_.data();
  RWKV_RETURN_IF_ERROR(ops_.wkv4(args, at.stream));
  return AddProduct(at, w.matrix(Role::kOutput), r_.data());
}

absl::Status Rwkv4Stage::ChannelMix(const LayerStep& at) { return GatedChannelMix(at, kChannelMixShift); }

}  // namespace rwkv::worker
