#include "services/worker/model/block/rwkv7_stage.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace rwkv::worker {

using kernels::Activation;

absl::StatusOr<std::unique_ptr<StageModel>> Rwkv7Stage::Create(std::shared_ptr<const StageWeights> weights,
                                                               const kernels::OpTable& ops, int64_t max_rows) {
  std::unique_ptr<Rwkv7Stage> stage(new Rwkv7Stage(std::move(weights), ops, max_rows));
  RWKV_RETURN_IF_ERROR(stage->Allocate());
  return absl::StatusOr<std::unique_ptr<StageModel>>(std::move(stage));
}

Rwkv7Stage::Rwkv7Stage(std::shared_ptr<const StageWeights> weights, const kernels::OpTable& ops, int64_t max_rows)
    : weights_(std::move(weights)),
      ops_(ops),
      max_rows_(max_rows),
      layout_(
          {{"att.x_prev", {weights_->config().width}},
           {"att.state", {weights_->config().head_count, weights_->config().head_size, weights_->config().head_size}},
           {"ffn.x_prev", {weights_->config().width}}}) {}

absl::Status Rwkv7Stage::Allocate() {
  const checkpoint::ModelConfig& config = weights_->config();
  const auto allocate = [this](int64_t width, kernels::AlignedBuffer<float>& buffer) -> absl::Status {
    RWKV_ASSIGN_OR_RETURN(buffer, kernels::AlignedBuffer<float>::Create(max_rows_ * width));
    return absl::OkStatus();
  };
  RWKV_RETURN_IF_ERROR(allocate(config.width, act_.normed));
  for (kernels::AlignedBuffer<float>& shifted : act_.shifted) RWKV_RETURN_IF_ERROR(allocate(config.width, shifted));
  for (kernels::AlignedBuffer<float>* buffer :
       {&act_.r, &act_.k, &act_.v, &act_.w, &act_.a, &act_.b, &act_.g, &act_.value_gate, &act_.y}) {
    RWKV_RETURN_IF_ERROR(allocate(config.attention_width, *buffer));
  }
  int64_t largest_rank = 1;
  for (const checkpoint::ModelConfig::Ranks& ranks : config.ranks) {
    largest_rank = std::max({largest_rank, ranks.decay, ranks.iclr, ranks.value_residual, ranks.gate});
  }
  RWKV_RETURN_IF_ERROR(allocate(largest_rank, act_.low_rank));
  return allocate(config.ffn_width, act_.ffn_hidden);
}

absl::Span<const float> Rwkv7Stage::InitialState(int stage_layer, int tensor) const {
  if (tensor != kWkv) return {};
  return weights_->layer(weights_->layers().begin + stage_layer).initial_state;
}

absl::Status Rwkv7Stage::Forward(const StageStep& step, const StateView& state, kernels::Stream& stream) {
  if (step.rows < 1 || step.rows > max_rows_) {
    return absl::InvalidArgumentError(absl::StrCat("rwkv7: ", step.rows, " rows, room for ", max_rows_));
  }
  if (weights_->is_first()) {
    kernels::EmbedArgs args;
    args.rows = step.rows;
    args.tokens = step.tokens;
    args.embedding = weights_->embedding();
    if (!weights_->ln0().weight.empty()) {
      args.weight = weights_->ln0().weight.data();
      args.bias = weights_->ln0().bias.data();
    }
    args.x = step.x;
    RWKV_RETURN_IF_ERROR(ops_.embed(args, stream));
  }
  for (int layer = weights_->layers().begin; layer < weights_->layers().end; ++layer) {
    RWKV_RETURN_IF_ERROR(TimeMix(layer, step, state, stream));
    RWKV_RETURN_IF_ERROR(ChannelMix(layer, step, state, stream));
  }
  if (weights_->is_last() && !step.logit_rows.empty()) return Logits(step, stream);
  return absl::OkStatus();
}

absl::Status Rwkv7Stage::TimeMix(int layer, const StageStep& step, const StateView& state, kernels::Stream& stream) {
  const checkpoint::ModelConfig& config = weights_->config();
  const LayerWeights& weights = weights_->layer(layer);
  const int stage_layer = layer - weights_->layers().begin;
  const int64_t rows = step.rows;

  RWKV_RETURN_IF_ERROR(Norm(weights.ln1, rows, step.x, act_.normed.data(), stream));
  {
    const StateTensorPool& shift = state.tensor(stage_layer, kTimeMixShift);
    kernels::TokenShiftArgs args;
    args.rows = rows;
    args.width = config.width;
    args.spans = step.spans.data();
    args.span_count = static_cast<int64_t>(step.spans.size());
    args.state_pool = shift.data;
    args.state_stride = shift.stride;
    args.state_slots = state.slots;
    args.x = act_.normed.data();
    args.outputs = kShifted;
    const float* const mix[kShifted] = {weights.x_r.data(), weights.x_w.data(), weights.x_k.data(),
                                        weights.x_v.data(), weights.x_a.data(), weights.x_g.data()};
    for (int i = 0; i < kShifted; ++i) {
      args.mix[i] = mix[i];
      args.y[i] = act_.shifted[i].data();
    }
    RWKV_RETURN_IF_ERROR(ops_.token_shift(args, stream));
  }
  const float* const x_r = act_.shifted[0].data();
  const float* const x_w = act_.shifted[1].data();
  const float* const x_k = act_.shifted[2].data();
  const float* const x_v = act_.shifted[3].data();
  const float* const x_a = act_.shifted[4].data();
  const float* const x_g = act_.shifted[5].data();

  // In layer 0 the value is v_first itself: it is made in place and nothing changes it.
  const bool is_layer0 = layer == 0;
  float* const v = is_layer0 ? step.v_first : act_.v.data();

  RWKV_RETURN_IF_ERROR(Matmul(weights.receptance, rows, x_r, act_.r.data(), Activation::kNone, false, stream));
  RWKV_RETURN_IF_ERROR(Matmul(weights.key, rows, x_k, act_.k.data(), Activation::kNone, false, stream));
  RWKV_RETURN_IF_ERROR(Matmul(weights.value, rows, x_v, v, Activation::kNone, false, stream));
  RWKV_RETURN_IF_ERROR(LowRank(weights.w1, Activation::kTanh, weights.w2, rows, x_w, act_.w.data(), stream));
  RWKV_RETURN_IF_ERROR(LowRank(weights.a1, Activation::kNone, weights.a2, rows, x_a, act_.b.data(), stream));
  RWKV_RETURN_IF_ERROR(LowRank(weights.g1, Activation::kSigmoid, weights.g2, rows, x_g, act_.g.data(), stream));
  if (!is_layer0) {
    RWKV_RETURN_IF_ERROR(LowRank(weights.v1, Activation::kNone, weights.v2, rows, x_v, act_.value_gate.data(), stream));
  }
  {
    kernels::Wkv7PrepareArgs args;
    args.rows = rows;
    args.heads = config.head_count;
    args.head_size = config.head_size;
    args.decay_bias = weights.w0.data();
    args.iclr_bias = weights.a0.data();
    args.k_k = weights.k_k.data();
    args.k_a = weights.k_a.data();
    args.decay_lora = act_.w.data();
    args.iclr_lora = act_.b.data();
    if (!is_layer0) {
      args.value_gate_bias = weights.v0.data();
      args.value_gate_lora = act_.value_gate.data();
      args.v_first = step.v_first;
    }
    args.k = act_.k.data();
    args.v = v;
    args.w = act_.w.data();
    args.a = act_.a.data();
    args.b = act_.b.data();
    RWKV_RETURN_IF_ERROR(ops_.wkv7_prepare(args, stream));
  }
  {
    const StateTensorPool& wkv = state.tensor(stage_layer, kWkv);
    kernels::Wkv7Args args;
    args.rows = rows;
    args.heads = config.head_count;
    args.head_size = config.head_size;
    args.spans = step.spans.data();
    args.span_count = static_cast<int64_t>(step.spans.size());
    args.state_pool = wkv.data;
    args.state_stride = wkv.stride;
    args.state_slots = state.slots;
    args.r = act_.r.data();
    args.w = act_.w.data();
    args.k = act_.k.data();
    args.v = v;
    args.a = act_.a.data();
    args.b = act_.b.data();
    args.y = act_.y.data();
    RWKV_RETURN_IF_ERROR(ops_.wkv7(args, stream));
  }
  {
    kernels::Wkv7OutputArgs args;
    args.rows = rows;
    args.heads = config.head_count;
    args.head_size = config.head_size;
    args.ln_weight = weights.ln_x.weight.data();
    args.ln_bias = weights.ln_x.bias.data();
    args.bonus = weights.r_k.data();
    args.y = act_.y.data();
    args.r = act_.r.data();
    args.k = act_.k.data();
    args.v = v;
    args.g = act_.g.data();
    args.out = act_.y.data();
    RWKV_RETURN_IF_ERROR(ops_.wkv7_output(args, stream));
  }
  return Matmul(weights.output, rows, act_.y.data(), step.x, Activation::kNone, true, stream);
}

absl::Status Rwkv7Stage::ChannelMix(int layer, const StageStep& step, const StateView& state, kernels::Stream& stream) {
  const LayerWeights& weights = weights_->layer(layer);
  RWKV_RETURN_IF_ERROR(Norm(weights.ln2, step.rows, step.x, act_.normed.data(), stream));
  const StateTensorPool& shift = state.tensor(layer - weights_->layers().begin, kChannelMixShift);
  kernels::TokenShiftArgs args;
  args.rows = step.rows;
  args.width = weights_->config().width;
  args.spans = step.spans.data();
  args.span_count = static_cast<int64_t>(step.spans.size());
  args.state_pool = shift.data;
  args.state_stride = shift.stride;
  args.state_slots = state.slots;
  args.x = act_.normed.data();
  args.outputs = 1;
  args.mix[0] = weights.ffn_x_k.data();
  args.y[0] = act_.shifted[0].data();
  RWKV_RETURN_IF_ERROR(ops_.token_shift(args, stream));
  RWKV_RETURN_IF_ERROR(Matmul(weights.ffn_key, step.rows, act_.shifted[0].data(), act_.ffn_hidden.data(),
                              Activation::kSquaredRelu, false, stream));
  return Matmul(weights.ffn_value, step.rows, act_.ffn_hidden.data(), step.x, Activation::kNone, true, stream);
}

absl::Status Rwkv7Stage::Logits(const StageStep& step, kernels::Stream& stream) {
  const int64_t width = weights_->config().width;
  const int64_t count = static_cast<int64_t>(step.logit_rows.size());
  // The norm gathers: each run of neighbouring rows is one call.
  for (int64_t begin = 0; begin < count;) {
    int64_t end = begin + 1;
    while (end < count && step.logit_rows[end] == step.logit_rows[end - 1] + 1) ++end;
    RWKV_RETURN_IF_ERROR(Norm(weights_->ln_out(), end - begin, step.x + step.logit_rows[begin] * width,
                              act_.normed.data() + begin * width, stream));
    begin = end;
  }
  return Matmul(weights_->head(), count, act_.normed.data(), step.logits, Activation::kNone, false, stream);
}

absl::Status Rwkv7Stage::Norm(const NormWeights& norm, int64_t rows, const float* x, float* y,
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

absl::Status Rwkv7Stage::Matmul(const kernels::MatrixView& weight, int64_t rows, const float* x, float* y,
                                Activation activation, bool accumulate, kernels::Stream& stream) const {
  kernels::MatmulArgs args;
  args.rows = rows;
  args.weight = weight;
  args.x = x;
  args.activation = activation;
  args.accumulate = accumulate;
  args.y = y;
  return ops_.matmul(args, stream);
}

absl::Status Rwkv7Stage::LowRank(const kernels::MatrixView& first, Activation activation,
                                 const kernels::MatrixView& second, int64_t rows, const float* x, float* y,
                                 kernels::Stream& stream) {
  RWKV_RETURN_IF_ERROR(Matmul(first, rows, x, act_.low_rank.data(), activation, false, stream));
  return Matmul(second, rows, act_.low_rank.data(), y, Activation::kNone, false, stream);
}

}  // namespace rwkv::worker
