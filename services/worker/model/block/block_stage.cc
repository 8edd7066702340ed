#include "services/worker/model/block/block_stage.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/api/embed.h"
#include "kernels/api/layer_norm.h"
#include "kernels/base/status_macros.h"

namespace rwkv::worker {

BlockStage::BlockStage(std::shared_ptr<const StageWeights> weights, kernels::Device& device,
                       const StageModelOptions& options, StateLayout layout)
    : weights_(std::move(weights)),
      device_(device),
      ops_(device.ops()),
      options_(options),
      layout_(std::move(layout)) {}

absl::Status BlockStage::Allocate(int64_t width, std::initializer_list<Buffer*> buffers) const {
  for (Buffer* buffer : buffers) {
    RWKV_ASSIGN_OR_RETURN(*buffer, Buffer::Create(options_.max_rows * width));
  }
  return absl::OkStatus();
}

absl::Status BlockStage::AllocateShared(int shifts) {
  const checkpoint::ModelConfig& config = weights_->config();
  int64_t largest_rank = 0;
  for (int layer = weights_->layers().begin; layer < weights_->layers().end; ++layer) {
    for (const checkpoint::ModelTensor& spec : checkpoint::LayerTensors(config.version)) {
      if (spec.kind != checkpoint::Kind::kLowRank) continue;
      for (checkpoint::Size size : spec.shape) {
        if (checkpoint::IsRank(size)) largest_rank = std::max(largest_rank, config.layer_sizes[layer][size]);
      }
    }
  }
  RWKV_RETURN_IF_ERROR(Allocate(config.width, {&normed_}));
  for (int i = 0; i < shifts; ++i) RWKV_RETURN_IF_ERROR(Allocate(config.width, {&shifted_[i]}));
  RWKV_RETURN_IF_ERROR(Allocate(largest_rank, {&low_rank_}));
  return Allocate(config.ffn_width, {&hidden_});
}

absl::Status BlockStage::Forward(const StageStep& step, const StateView& state, kernels::Stream& stream) {
  if (step.rows < 1 || step.rows > options_.max_rows) {
    return absl::InvalidArgumentError(absl::StrCat("rwkv: ", step.rows, " rows, room for ", options_.max_rows));
  }
  if (weights_->is_first()) RWKV_RETURN_IF_ERROR(Embed(step.tokens, step.rows, step.x, stream));
  RWKV_RETURN_IF_ERROR(BeginStep(step, state, stream));
  for (int layer = weights_->layers().begin; layer < weights_->layers().end; ++layer) {
    const WeightSet& weights = weights_->layer(layer);
    const kernels::StatePool* const pools =
        state.pools + (layer - weights_->layers().begin) * static_cast<int64_t>(state.tensors_per_layer);
    const LayerStep at = {layer, weights, pools, state.slots, step, stream};
    RWKV_RETURN_IF_ERROR(Norm(weights.norm(Role::kLn1), step.rows, step.x, normed_.data(), stream));
    RWKV_RETURN_IF_ERROR(TimeMix(at));
    RWKV_RETURN_IF_ERROR(Norm(weights.norm(Role::kLn2), step.rows, step.x, normed_.data(), stream));
    RWKV_RETURN_IF_ERROR(ChannelMix(at));
  }
  if (weights_->is_last()) {
    RWKV_RETURN_IF_ERROR(FinalNorm(step.hidden_rows, step.x, step.hidden, stream));
    if (!step.logit_rows.empty()) return Logits(step, stream);
  }
  return absl::OkStatus();
}

absl::Status BlockStage::Embed(const int32_t* tokens, int64_t rows, float* y, kernels::Stream& stream) const {
  kernels::EmbedArgs args;
  args.rows = rows;
  args.tokens = tokens;
  args.embedding = weights_->embedding();
  if (!weights_->ln0().weight.empty()) {
    args.weight = weights_->ln0().weight.data();
    args.bias = weights_->ln0().bias.data();
  }
  args.x = y;
  return ops_.embed(args, stream);
}

absl::Status BlockStage::FinalNorm(absl::Span<const int64_t> rows, const float* x, float* y,
                                   kernels::Stream& stream) const {
  const int64_t width = weights_->config().width;
  const int64_t count = static_cast<int64_t>(rows.size());
  // The norm gathers: each run of neighbouring rows is one call.
  for (int64_t begin = 0; begin < count;) {
    int64_t end = begin + 1;
    while (end < count && rows[end] == rows[end - 1] + 1) ++end;
    RWKV_RETURN_IF_ERROR(Norm(weights_->ln_out(), end - begin, x + rows[begin] * width, y + begin * width, stream));
    begin = end;
  }
  return absl::OkStatus();
}

absl::Status BlockStage::Logits(const StageStep& step, kernels::Stream& stream) {
  RWKV_RETURN_IF_ERROR(FinalNorm(step.logit_rows, step.x, normed_.data(), stream));
  kernels::MatmulArgs args;
  args.rows = static_cast<int64_t>(step.logit_rows.size());
  args.weight = weights_->head();
  args.x = normed_.data();
  args.y = step.logits;
  return ops_.matmul(args, stream);
}

absl::Status BlockStage::GatedChannelMix(const LayerStep& at, int state_tensor) {
  RWKV_RETURN_IF_ERROR(TokenShift(at, state_tensor, {Role::kFfnShiftK, Role::kFfnShiftR}));
  // The norm is done with: its place takes the receptance.
  RWKV_RETURN_IF_ERROR(Matmul(at, at.weights.matrix(Role::kFfnReceptance), shifted_[1].data(), normed_.data(),
                              kernels::Activation::kSigmoid));
  RWKV_RETURN_IF_ERROR(Matmul(at, at.weights.matrix(Role::kFfnKey), shifted_[0].data(), hidden_.data(),
                              kernels::Activation::kSquaredRelu));
  return AddMatmul(at, at.weights.matrix(Role::kFfnValue), hidden_.data(), normed_.data());
}

kernels::TokenShiftArgs BlockStage::TokenShiftArgs(const LayerStep& at, int state_tensor,
                                                   std::initializer_list<Role> mixes) {
  kernels::TokenShiftArgs args;
  args.rows = at.step.rows;
  args.width = weights_->config().width;
  args.spans = at.step.spans.data();
  args.span_count = static_cast<int64_t>(at.step.spans.size());
  args.state_pool = at.pools[state_tensor].data;
  args.state_stride = at.pools[state_tensor].stride;
  args.state_slots = at.state_slots;
  args.x = normed_.data();
  for (Role role : mixes) {
    args.mix[args.outputs] = at.weights.vector(role).data();
    args.y[args.outputs] = shifted_[args.outputs].data();
    ++args.outputs;
  }
  return args;
}

absl::Status BlockStage::TokenShift(const LayerStep& at, int state_tensor, std::initializer_list<Role> mixes) {
  return ops_.token_shift(TokenShiftArgs(at, state_tensor, mixes), at.stream);
}

absl::Status BlockStage::Norm(const NormWeights& norm, int64_t rows, const float* x, float* y,
                              kernels::Stream& stream) const {
  kernels::LayerNormArgs args;
  args.rows = rows;
  args.width = weights_->config().width;
  args.x = x;
  args.weight = norm.weight.data();
  args.bias = norm.bias.data();
  args.y = y;
  return ops_.layer_norm(args, stream);
}

absl::Status BlockStage::Matmul(const LayerStep& at, const kernels::MatrixView& weight, const float* x, float* y,
                                kernels::Activation activation, const float* bias, const float* gate) const {
  kernels::MatmulArgs args;
  args.rows = at.step.rows;
  args.weight = weight;
  args.x = x;
  args.bias = bias;
  args.activation = activation;
  args.gate = gate;
  args.y = y;
  return ops_.matmul(args, at.stream);
}

absl::Status BlockStage::AddMatmul(const LayerStep& at, const kernels::MatrixView& weight, const float* x,
                                   const float* gate) const {
  kernels::MatmulArgs args;
  args.rows = at.step.rows;
  args.weight = weight;
  args.x = x;
  args.gate = gate;
  args.accumulate = true;
  args.y = at.step.x;
  return ops_.matmul(args, at.stream);
}

absl::Status BlockStage::LowRank(const LayerStep& at, const kernels::MatrixView& down, kernels::Activation activation,
                                 const kernels::MatrixView& up, const float* x, float* y, const float* bias,
                                 kernels::Activation activation_up) {
  RWKV_RETURN_IF_ERROR(Matmul(at, down, x, low_rank_.data(), activation));
  return Matmul(at, up, low_rank_.data(), y, activation_up, bias);
}

}  // namespace rwkv::worker
