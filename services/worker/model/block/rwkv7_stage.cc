#include "services/worker/model/block/rwkv7_stage.h"

#include <algorithm>
#include <utility>

#include "kernels/api/deep_embed.h"
#include "kernels/api/deep_embed_attention.h"
#include "kernels/api/matmul.h"
#include "kernels/api/sequence_span.h"
#include "kernels/api/state_pool.h"
#include "kernels/api/wkv7.h"
#include "kernels/api/wkv7_output.h"
#include "kernels/api/wkv7_prepare.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/model_config.h"
#include "services/checkpoint/model_tensors.h"

namespace rwkv::worker {

using kernels::Activation;

namespace {

using checkpoint::Size;

// The largest value of a rank in any layer.
int64_t Largest(const checkpoint::ModelConfig& config, Size size) {
  int64_t largest = 0;
  for (const checkpoint::Sizes& sizes : config.layer_sizes) largest = std::max(largest, sizes[size]);
  return largest;
}

StateLayout LayoutOf(const checkpoint::ModelConfig& config, const StageModelOptions& options) {
  std::vector<StateTensorSpec> tensors = {{"att.x_prev", {config.width}},
                                          {"att.state", {config.head_count, config.head_size, config.head_size}},
                                          {"ffn.x_prev", {config.width}}};
  if (config.version == checkpoint::ModelVersion::k7b) {
    const int64_t cache_width = config.layer_sizes[0][Size::kCacheWidth];
    tensors.push_back({"qkv.length", {1}});
    tensors.push_back({"qkv.tokens", {options.deep_embed_context}});
    tensors.push_back({"qkv.k_cache", {options.deep_embed_context, cache_width}});
    tensors.push_back({"qkv.v_cache", {options.deep_embed_context, cache_width}});
    tensors.push_back({"qkv.q_prev", {config.layer_sizes[0][Size::kQueryWidth]}});
  }
  return StateLayout(std::move(tensors));
}

}  // namespace

absl::StatusOr<std::unique_ptr<StageModel>> Rwkv7Stage::Create(std::shared_ptr<const StageWeights> weights,
                                                               kernels::Device& device,
                                                               const StageModelOptions& options) {
  std::unique_ptr<Rwkv7Stage> stage(new Rwkv7Stage(std::move(weights), device, options));
  RWKV_RETURN_IF_ERROR(stage->AllocateShared(6));
  RWKV_RETURN_IF_ERROR(stage->Allocate(stage->weights_->config().attention_width,
                                       {&stage->r_, &stage->k_, &stage->v_, &stage->w_, &stage->a_, &stage->b_,
                                        &stage->g_, &stage->value_gate_, &stage->y_}));
  if (stage->has_deep_embed_) RWKV_RETURN_IF_ERROR(stage->AllocateDeepEmbed());
  return absl::StatusOr<std::unique_ptr<StageModel>>(std::move(stage));
}

Rwkv7Stage::Rwkv7Stage(std::shared_ptr<const StageWeights> weights, kernels::Device& device,
                       const StageModelOptions& options)
    : BlockStage(weights, device, options, LayoutOf(weights->config(), options)),
      has_deep_embed_(checkpoint::HasDeepEmbed(weights->config().version)),
      has_attention_(weights->config().version == checkpoint::ModelVersion::k7b) {}

absl::Status Rwkv7Stage::AllocateDeepEmbed() {
  const checkpoint::ModelConfig& config = weights_->config();
  for (int64_t row = 0; row < options_.max_rows; ++row) row_numbers_.push_back(static_cast<int32_t>(row));
  const int64_t width = Largest(config, Size::kDeepEmbedWidth);
  RWKV_RETURN_IF_ERROR(Allocate(config.width, {&embedded_}));
  RWKV_RETURN_IF_ERROR(Allocate(width * width, {&token_matrix_}));
  RWKV_RETURN_IF_ERROR(Allocate(width, {&deep_x_, &deep_y_}));
  if (!has_attention_) return absl::OkStatus();

  const int64_t query_width = Largest(config, Size::kQueryWidth);
  const int64_t cache_width = Largest(config, Size::kCacheWidth);
  for (const checkpoint::Sizes& sizes : config.layer_sizes) {
    if (sizes[Size::kQueryWidth] != query_width || sizes[Size::kCacheWidth] != cache_width) {
      return absl::UnimplementedError("rwkv7b: layers whose queries or cached rows differ in width");
    }
  }
  RWKV_RETURN_IF_ERROR(Allocate(std::max(query_width, config.width), {&made_}));
  RWKV_RETURN_IF_ERROR(Allocate(query_width, {&query_}));
  RWKV_RETURN_IF_ERROR(Allocate(cache_width, {&cache_key_, &cache_value_}));
  has_row_.resize(config.vocab_size);
  for (int layer = weights_->layers().begin; layer < weights_->layers().end; ++layer) {
    const WeightSet& w = weights_->layer(layer);
    RWKV_ASSIGN_OR_RETURN(MergedTable key, MergedTable::Create(w.matrix(Role::kKeyTable), w.matrix(Role::kKeyMap)));
    RWKV_ASSIGN_OR_RETURN(MergedTable value,
                          MergedTable::Create(w.matrix(Role::kValueTable), w.matrix(Role::kValueMap)));
    tables_.push_back({std::move(key), std::move(value)});
  }
  return absl::OkStatus();
}

absl::Span<const float> Rwkv7Stage::InitialState(int stage_layer, int tensor) const {
  if (tensor != kWkv) return {};
  return weights_->layer(weights_->layers().begin + stage_layer).vector(Role::kInitialState);
}

absl::Status Rwkv7Stage::TimeMix(const LayerStep& at) {
  const checkpoint::ModelConfig& config = weights_->config();
  const WeightSet& w = at.weights;
  const StageStep& step = at.step;
  // Reads x as it came; ln1 has been applied already.
  if (has_attention_) RWKV_RETURN_IF_ERROR(AddAttention(at));
  RWKV_RETURN_IF_ERROR(TokenShift(
      at, kTimeMixShift, {Role::kShiftR, Role::kShiftW, Role::kShiftK, Role::kShiftV, Role::kShiftA, Role::kShiftG}));
  const float* const x_r = shifted_[0].data();
  const float* const x_w = shifted_[1].data();
  const float* const x_k = shifted_[2].data();
  const float* const x_v = shifted_[3].data();
  const float* const x_a = shifted_[4].data();
  const float* const x_g = shifted_[5].data();

  // In layer 0 the value is v_first itself: it is made in place and nothing changes it.
  const bool is_layer0 = at.layer == 0;
  float* const v = is_layer0 ? step.v_first : v_.data();

  RWKV_RETURN_IF_ERROR(Matmul(at, w.matrix(Role::kReceptance), x_r, r_.data()));
  RWKV_RETURN_IF_ERROR(Matmul(at, w.matrix(Role::kKey), x_k, k_.data()));
  RWKV_RETURN_IF_ERROR(Matmul(at, w.matrix(Role::kValue), x_v, v));
  RWKV_RETURN_IF_ERROR(
      LowRank(at, w.matrix(Role::kDecayDown), Activation::kTanh, w.matrix(Role::kDecayUp), x_w, w_.data()));
  RWKV_RETURN_IF_ERROR(
      LowRank(at, w.matrix(Role::kIclrDown), Activation::kNone, w.matrix(Role::kIclrUp), x_a, b_.data()));
  RWKV_RETURN_IF_ERROR(
      LowRank(at, w.matrix(Role::kGateDown), Activation::kSigmoid, w.matrix(Role::kGateUp), x_g, g_.data()));
  if (!is_layer0) {
    RWKV_RETURN_IF_ERROR(LowRank(at, w.matrix(Role::kValueResidualDown), Activation::kNone,
                                 w.matrix(Role::kValueResidualUp), x_v, value_gate_.data()));
  }
  {
    kernels::Wkv7PrepareArgs args;
    args.rows = step.rows;
    args.heads = config.head_count;
    args.head_size = config.head_size;
    args.decay_bias = w.vector(Role::kDecay).data();
    args.iclr_bias = w.vector(Role::kIclr).data();
    args.k_k = w.vector(Role::kKeyScale).data();
    args.k_a = w.vector(Role::kKeyIclrScale).data();
    args.decay_lora = w_.data();
    args.iclr_lora = b_.data();
    if (!is_layer0) {
      args.value_gate_bias = w.vector(Role::kValueResidual).data();
      args.value_gate_lora = value_gate_.data();
      args.v_first = step.v_first;
    }
    args.k = k_.data();
    args.v = v;
    args.w = w_.data();
    args.a = a_.data();
    args.b = b_.data();
    RWKV_RETURN_IF_ERROR(ops_.wkv7_prepare(args, at.stream));
  }
  {
    kernels::Wkv7Args args;
    args.rows = step.rows;
    args.heads = config.head_count;
    args.head_size = config.head_size;
    args.spans = step.spans.data();
    args.span_count = static_cast<int64_t>(step.spans.size());
    args.state_pool = at.pools[kWkv].data;
    args.state_stride = at.pools[kWkv].stride;
    args.state_slots = at.state_slots;
    args.r = r_.data();
    args.w = w_.data();
    args.k = k_.data();
    args.v = v;
    args.a = a_.data();
    args.b = b_.data();
    args.y = y_.data();
    RWKV_RETURN_IF_ERROR(ops_.wkv7(args, at.stream));
  }
  {
    kernels::Wkv7OutputArgs args;
    args.rows = step.rows;
    args.heads = config.head_count;
    args.head_size = config.head_size;
    args.ln_weight = w.norm(Role::kLnX).weight.data();
    args.ln_bias = w.norm(Role::kLnX).bias.data();
    args.bonus = w.vector(Role::kBonus).data();
    args.epsilon = options_.group_norm_epsilon;
    args.y = y_.data();
    args.r = r_.data();
    args.k = k_.data();
    args.v = v;
    args.g = g_.data();
    args.out = y_.data();
    RWKV_RETURN_IF_ERROR(ops_.wkv7_output(args, at.stream));
  }
  return AddMatmul(at, w.matrix(Role::kOutput), y_.data());
}

absl::Status Rwkv7Stage::ChannelMix(const LayerStep& at) {
  const WeightSet& w = at.weights;
  RWKV_RETURN_IF_ERROR(TokenShift(at, kChannelMixShift, {Role::kFfnShiftK}));
  RWKV_RETURN_IF_ERROR(
      Matmul(at, w.matrix(Role::kFfnKey), shifted_[0].data(), hidden_.data(), Activation::kSquaredRelu));
  if (has_deep_embed_) RWKV_RETURN_IF_ERROR(GateHidden(at));
  return AddMatmul(at, w.matrix(Role::kFfnValue), hidden_.data());
}

absl::Status Rwkv7Stage::BeginStep(const StageStep& step, const StateView& state, kernels::Stream& stream) {
  if (has_attention_) RWKV_RETURN_IF_ERROR(MakeRows(step, state, stream));
  if (has_deep_embed_) return Embed(step.tokens, step.rows, embedded_.data(), stream);
  return absl::OkStatus();
}

absl::Status Rwkv7Stage::MakeRows(const StageStep& step, const StateView& state, kernels::Stream& stream) {
  missing_.clear();
  const auto need = [this](int32_t id) {
    if (has_row_[id]) return;
    has_row_[id] = true;
    missing_.push_back(id);
  };
  for (int64_t row = 0; row < step.rows; ++row) need(step.tokens[row]);
  // A state that came from elsewhere caches ids that this stage has not seen. All layers cache the same ids. What is no
  // id the operation refuses.
  for (const kernels::SequenceSpan& span : step.spans) {
    const kernels::StatePool& length = state.tensor(0, kLength);
    const kernels::StatePool& tokens = state.tensor(0, kTokenCache);
    const float cached = length.data[span.slot * length.stride];
    if (!(cached >= 0 && cached <= static_cast<float>(options_.deep_embed_context))) continue;
    for (int64_t t = 0; t < static_cast<int64_t>(cached); ++t) {
      const float id = tokens.data[span.slot * tokens.stride + t];
      if (id >= 0 && id < static_cast<float>(has_row_.size())) need(static_cast<int32_t>(id));
    }
  }
  for (size_t begin = 0; begin < missing_.size(); begin += options_.max_rows) {
    const int32_t* const ids = missing_.data() + begin;
    const int64_t rows = std::min<int64_t>(options_.max_rows, missing_.size() - begin);
    RWKV_RETURN_IF_ERROR(Embed(ids, rows, embedded_.data(), stream));
    for (Tables& tables : tables_) {
      for (MergedTable* table : {&tables.key, &tables.value}) {
        RWKV_RETURN_IF_ERROR(table->Make(ops_, ids, rows, embedded_.data(), made_.data(), stream));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status Rwkv7Stage::GateHidden(const LayerStep& at) {
  const WeightSet& w = at.weights;
  const kernels::MatrixView& table = w.matrix(Role::kDeepEmbedTable);
  RWKV_RETURN_IF_ERROR(MergeRows(ops_, table, w.matrix(Role::kDeepEmbedMap), at.step.tokens, at.step.rows,
                                 embedded_.data(), token_matrix_.data(), at.stream));
  RWKV_RETURN_IF_ERROR(Matmul(at, w.matrix(Role::kDeepEmbedDown), normed_.data(), deep_x_.data()));
  // The table of the step's own rows: a row's number is its token.
  kernels::DeepEmbedArgs args;
  args.rows = at.step.rows;
  args.width = w.matrix(Role::kDeepEmbedDown).rows;
  args.tokens = row_numbers_.data();
  args.table.rows = at.step.rows;
  args.table.cols = table.cols;
  args.table.data = token_matrix_.data();
  args.x = deep_x_.data();
  args.y = deep_y_.data();
  RWKV_RETURN_IF_ERROR(ops_.deep_embed(args, at.stream));
  return Matmul(at, w.matrix(Role::kDeepEmbedUp), deep_y_.data(), hidden_.data(), Activation::kNone,
                w.vector(Role::kDeepEmbedBias).data(), hidden_.data());
}

absl::Status Rwkv7Stage::AddAttention(const LayerStep& at) {
  const WeightSet& w = at.weights;
  const Tables& tables = tables_[at.layer - weights_->layers().begin];
  RWKV_RETURN_IF_ERROR(Matmul(at, w.matrix(Role::kQuery), at.step.x, query_.data()));
  RWKV_RETURN_IF_ERROR(Matmul(at, w.matrix(Role::kCacheKeyDown), at.step.x, cache_key_.data()));
  RWKV_RETURN_IF_ERROR(Matmul(at, w.matrix(Role::kCacheValueDown), at.step.x, cache_value_.data()));
  kernels::DeepEmbedAttentionArgs args;
  args.rows = at.step.rows;
  args.spans = at.step.spans.data();
  args.span_count = static_cast<int64_t>(at.step.spans.size());
  args.state_slots = at.state_slots;
  args.capacity = options_.deep_embed_context;
  args.length = at.pools[kLength];
  args.token_cache = at.pools[kTokenCache];
  args.key_cache = at.pools[kKeyCache];
  args.value_cache = at.pools[kValueCache];
  args.q_previous = at.pools[kLastQuery];
  args.k2 = w.matrix(Role::kCacheKeyUp);
  args.v2 = w.matrix(Role::kCacheValueUp);
  args.k_emb = tables.key.view();
  args.v_emb = tables.value.view();
  args.x_q = w.vector(Role::kQueryShift).data();
  args.x_k = w.vector(Role::kKeyShift).data();
  args.x_v = w.vector(Role::kValueShift).data();
  args.lnq_weight = w.norm(Role::kLnQuery).weight.data();
  args.lnq_bias = w.norm(Role::kLnQuery).bias.data();
  args.lnk_weight = w.norm(Role::kLnKey).weight.data();
  args.lnk_bias = w.norm(Role::kLnKey).bias.data();
  args.lnv_weight = w.norm(Role::kLnValue).weight.data();
  args.lnv_bias = w.norm(Role::kLnValue).bias.data();
  args.tokens = at.step.tokens;
  args.q = query_.data();
  args.key = cache_key_.data();
  args.value = cache_value_.data();
  args.y = at.step.x;
  return ops_.deep_embed_attention(args, at.stream);
}

}  // namespace rwkv::worker
