#include "services/worker/model/block/rwkv6_stage.h"

#include <utility>

#include "kernels/api/group_norm.h"
#include "kernels/api/matmul.h"
#include "kernels/api/token_shift.h"
#include "kernels/api/wkv6.h"
#include "kernels/base/matrix.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/model_config.h"
#include "services/checkpoint/model_tensors.h"

namespace rwkv::worker {
namespace {

using checkpoint::ModelVersion;
using kernels::Activation;

StateLayout LayoutOf(const checkpoint::ModelConfig& config) {
  return StateLayout({{"att.x_prev", {config.width}},
                      {"att.state", {config.head_count, config.head_size, config.head_size}},
                      {"ffn.x_prev", {config.width}}});
}

// Part `index` of a stack of five.
kernels::MatrixView PartOf(const kernels::MatrixView& stack, int index) {
  kernels::MatrixView part = stack;
  part.rows = stack.rows / 5;
  part.data = static_cast<const char*>(stack.data) + index * part.rows * kernels::RowBytes(stack);
  return part;
}

}  // namespace

absl::StatusOr<std::unique_ptr<StageModel>> Rwkv6Stage::Create(std::shared_ptr<const StageWeights> weights,
                                                               kernels::Device& device,
                                                               const StageModelOptions& options) {
  std::unique_ptr<Rwkv6Stage> stage(new Rwkv6Stage(std::move(weights), device, options));
  RWKV_RETURN_IF_ERROR(stage->AllocateShared(stage->is_6_ ? 6 : 4));
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
  return weights_->layer(weights_->layers().begin + stage_layer).vector(Role::kInitialState);
}

absl::Status Rwkv6Stage::DataDependentShift(const LayerStep& at) {
  const WeightSet& w = at.weights;
  constexpr int kX = 5;
  kernels::TokenShiftArgs args = TokenShiftArgs(at, kTimeMixShift, {Role::kShiftX});
  args.y[0] = shifted_[kX].data();
  args.keep_state = true;
  RWKV_RETURN_IF_ERROR(ops_.token_shift(args, at.stream));
  constexpr Shift kStack[] = {kW, kK, kV, kR, kG};  // As they lie in the file.
  for (int i = 0; i < 5; ++i) {
    RWKV_RETURN_IF_ERROR(LowRank(at, PartOf(w.matrix(Role::kShiftDown), i), Activation::kTanh,
                                 PartOf(w.matrix(Role::kShiftUp), i), shifted_[kX].data(), shifted_[kStack[i]].data()));
  }
  args = TokenShiftArgs(at, kTimeMixShift, {Role::kShiftK, Role::kShiftV, Role::kShiftR, Role::kShiftG, Role::kShiftW});
  for (int i = 0; i < 5; ++i) args.mix_delta[i] = args.y[i];
  return ops_.token_shift(args, at.stream);
}

absl::Status Rwkv6Stage::TimeMix(const LayerStep& at) {
  const checkpoint::ModelConfig& config = weights_->config();
  const WeightSet& w = at.weights;
  if (is_6_) {
    RWKV_RETURN_IF_ERROR(DataDependentShift(at));
    RWKV_RETURN_IF_ERROR(LowRank(at, w.matrix(Role::kDecayDown), Activation::kTanh, w.matrix(Role::kDecayUp),
                                 shifted_[kW].data(), w_.data(), w.vector(Role::kDecay).data(), Activation::kDecay));
  } else if (has_gate_) {
    RWKV_RETURN_IF_ERROR(TokenShift(at, kTimeMixShift, {Role::kShiftK, Role::kShiftV, Role::kShiftR, Role::kShiftG}));
  } else {
    RWKV_RETURN_IF_ERROR(TokenShift(at, kTimeMixShift, {Role::kShiftK, Role::kShiftV, Role::kShiftR}));
  }
  RWKV_RETURN_IF_ERROR(Matmul(at, w.matrix(Role::kKey), shifted_[kK].data(), k_.data()));
  RWKV_RETURN_IF_ERROR(Matmul(at, w.matrix(Role::kValue), shifted_[kV].data(), v_.data()));
  RWKV_RETURN_IF_ERROR(Matmul(at, w.matrix(Role::kReceptance), shifted_[kR].data(), r_.data()));
  if (has_gate_) {
    RWKV_RETURN_IF_ERROR(Matmul(at, w.matrix(Role::kGate), shifted_[kG].data(), g_.data(), Activation::kSilu));
  }
  {
    kernels::Wkv6Args args;
    args.rows = at.step.rows;
    args.heads = config.head_count;
    args.head_size = config.head_size;
    args.spans = at.step.spans.data();
    args.span_count = static_cast<int64_t>(at.step.spans.size());
    args.state_pool = at.pools[kWkv].data;
    args.state_stride = at.pools[kWkv].stride;
    args.state_slots = at.state_slots;
    args.r = r_.data();
    args.w = is_6_ ? w_.data() : w.vector(Role::kDecay).data();
    args.constant_decay = !is_6_;
    args.k = k_.data();
    args.v = v_.data();
    args.bonus = w.vector(Role::kBonus).data();
    args.y = y_.data();
    RWKV_RETURN_IF_ERROR(ops_.wkv6(args, at.stream));
  }
  {
    kernels::GroupNormArgs args;
    args.rows = at.step.rows;
    args.heads = config.head_count;
    args.head_size = config.head_size;
    args.y = y_.data();
    args.weight = w.norm(Role::kLnX).weight.data();
    args.bias = w.norm(Role::kLnX).bias.data();
    args.epsilon = options_.group_norm_epsilon;
    args.gate = has_gate_ ? g_.data() : nullptr;
    args.out = y_.data();
    RWKV_RETURN_IF_ERROR(ops_.group_norm(args, at.stream));
  }
  return AddMatmul(at, w.matrix(Role::kOutput), y_.data());
}

absl::Status Rwkv6Stage::ChannelMix(const LayerStep& at) { return GatedChannelMix(at, kChannelMixShift); }

}  // namespace rwkv::worker
