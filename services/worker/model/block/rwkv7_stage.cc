#include "services/worker/model/block/rwkv7_stage.h"

#include <algorithm>
#include <utility>

#include "kernels/api/deep_embed.h"
#include "kernels/api/deep_embed_attention.h"
#include "kernels/api/embed.h"
#include "kernels/api/mix_input.h"
#include "kernels/api/sequence_span.h"
#include "kernels/api/state_tensor.h"
#include "kernels/api/wkv7.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/model_config.h"
#include "services/checkpoint/model_tensors.h"

namespace rwkv::worker {

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
  RWKV_RETURN_IF_ERROR(stage->AllocateShared(6, 4));
  RWKV_RETURN_IF_ERROR(stage->Allocate(stage->weights_->config().attention_width,
                                       {&stage->r_, &stage->k_, &stage->v_, &stage->decay_, &stage->iclr_,
                                        &stage->gate_, &stage->value_gate_, &stage->y_}));
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
  const auto pinned = kernels::MemoryKind::kPinned;
  RWKV_ASSIGN_OR_RETURN(pinned_ids_, kernels::DeviceArray<int32_t>::Create(device_, options_.max_rows, pinned));
  RWKV_ASSIGN_OR_RETURN(ids_, kernels::DeviceArray<int32_t>::Create(device_, options_.max_rows));
  RWKV_ASSIGN_OR_RETURN(pinned_lengths_, Buffer::Create(device_, options_.max_rows, pinned));
  RWKV_ASSIGN_OR_RETURN(pinned_cache_, Buffer::Create(device_, options_.deep_embed_context, pinned));
  has_row_.resize(config.vocab_size);
  missing_.reserve(config.vocab_size);
  for (int layer = weights_->layers().begin; layer < weights_->layers().end; ++layer) {
    const WeightSet& w = weights_->layer(layer);
    RWKV_ASSIGN_OR_RETURN(MergedTable key,
                          MergedTable::Create(device_, w.matrix(Role::kKeyTable), w.matrix(Role::kKeyMap)));
    RWKV_ASSIGN_OR_RETURN(MergedTable value,
                          MergedTable::Create(device_, w.matrix(Role::kValueTable), w.matrix(Role::kValueMap)));
    tables_.push_back({std::move(key), std::move(value)});
  }
  return absl::OkStatus();
}

absl::Span<const float> Rwkv7Stage::InitialState(int stage_layer, int tensor) const {
  if (tensor != kWkv) return {};
  return weights_->layer(weights_->layers().begin + stage_layer).initial_state();
}

absl::Status Rwkv7Stage::TimeMix(const LayerStep& at) {
  const checkpoint::ModelConfig& config = weights_->config();
  const WeightSet& w = at.weights;
  RWKV_RETURN_IF_ERROR(
      MixInput(at, Role::kLn1, kTimeMixShift,
               {Role::kShiftR, Role::kShiftW, Role::kShiftK, Role::kShiftV, Role::kShiftA, Role::kShiftG}));
  if (has_attention_) RWKV_RETURN_IF_ERROR(AddAttention(at));
  const float* const x_r = shifted_[0].data();
  const float* const x_w = shifted_[1].data();
  const float* const x_k = shifted_[2].data();
  const float* const x_v = shifted_[3].data();
  const float* const x_a = shifted_[4].data();
  const float* const x_g = shifted_[5].data();

  // In layer 0 the value is v_first itself, and there is no value residual: it comes last.
  const bool is_layer0 = at.layer == 0;
  const int count = is_layer0 ? 3 : 4;
  Product products[] = {To(low_rank_[0], w.matrix(Role::kDecayDown), x_w, Activation::kTanh),
                        To(low_rank_[1], w.matrix(Role::kIclrDown), x_a),
                        To(low_rank_[2], w.matrix(Role::kGateDown), x_g, Activation::kSigmoid),
                        To(r_, w.matrix(Role::kReceptance), x_r),
                        To(k_, w.matrix(Role::kKey), x_k),
                        To(v_, w.matrix(Role::kValue), x_v),
                        To(low_rank_[3], w.matrix(Role::kValueResidualDown), x_v)};
  if (is_layer0) products[5].y = at.step.v_first;
  RWKV_RETURN_IF_ERROR(Products(at, absl::MakeConstSpan(products).first(3 + count)));
  const Product ups[] = {To(decay_, w.matrix(Role::kDecayUp), low_rank_[0].data()),
                         To(iclr_, w.matrix(Role::kIclrUp), low_rank_[1].data()),
                         To(gate_, w.matrix(Role::kGateUp), low_rank_[2].data()),
                         To(value_gate_, w.matrix(Role::kValueResidualUp), low_rank_[3].data())};
  RWKV_RETURN_IF_ERROR(Products(at, absl::MakeConstSpan(ups).first(count)));

  kernels::Wkv7Args args;
  args.step = &at.rows;
  args.heads = config.head_count;
  args.head_size = config.head_size;
  args.state = at.state[kWkv];
  args.decay_bias = w.vector(Role::kDecay).data();
  args.iclr_bias = w.vector(Role::kIclr).data();
  args.k_k = w.vector(Role::kKeyScale).data();
  args.k_a = w.vector(Role::kKeyIclrScale).data();
  args.bonus = w.vector(Role::kBonus).data();
  args.ln_weight = w.norm(Role::kLnX).weight.data();
  args.ln_bias = w.norm(Role::kLnX).bias.data();
  args.epsilon = options_.group_norm_epsilon;
  args.r = r_.data();
  args.k = k_.data();
  args.v = products[5].y;
  args.g = gate_.data();
  args.decay_lora = decay_.data();
  args.iclr_lora = iclr_.data();
  if (!is_layer0) {
    args.value_gate_bias = w.vector(Role::kValueResidual).data();
    args.value_gate_lora = value_gate_.data();
    args.v_first = at.step.v_first;
  }
  args.y = y_.data();
  RWKV_RETURN_IF_ERROR(ops_.wkv7(args, at.stream));
  return AddProduct(at, w.matrix(Role::kOutput), y_.data());
}

absl::Status Rwkv7Stage::ChannelMix(const LayerStep& at) {
  const WeightSet& w = at.weights;
  kernels::MixInputArgs input = MixInputArgs(at, Role::kLn2, kChannelMixShift, {Role::kFfnShiftK});
  if (has_deep_embed_) input.normed = normed_.data();
  RWKV_RETURN_IF_ERROR(ops_.mix_input(input, at.stream));
  const Product key = To(hidden_, w.matrix(Role::kFfnKey), shifted_[0].data(), Activation::kSquaredRelu);
  RWKV_RETURN_IF_ERROR(has_deep_embed_ ? GatedKey(at, key) : Products(at, {key}));
  return AddProduct(at, w.matrix(Role::kFfnValue), hidden_.data());
}

absl::Status Rwkv7Stage::GatedKey(const LayerStep& at, const Product& key) {
  const WeightSet& w = at.weights;
  // The tokens' rows of the table, to which the map's product is added.
  kernels::EmbedArgs lookup;
  lookup.rows = at.rows.rows;
  lookup.tokens = at.rows.tokens;
  lookup.embedding = &w.matrix(Role::kDeepEmbedTable);
  lookup.x = token_matrix_.data();
  RWKV_RETURN_IF_ERROR(ops_.embed(lookup, at.stream));
  Product merge = To(token_matrix_, w.matrix(Role::kDeepEmbedMap), embedded_.data());
  merge.accumulate = true;
  RWKV_RETURN_IF_ERROR(Products(at, {key, merge, To(deep_x_, w.matrix(Role::kDeepEmbedDown), normed_.data())}));
  kernels::DeepEmbedArgs args;
  args.rows = at.rows.rows;
  args.width = w.matrix(Role::kDeepEmbedDown).matrix.rows;
  args.matrices = token_matrix_.data();
  args.x = deep_x_.data();
  args.y = deep_y_.data();
  RWKV_RETURN_IF_ERROR(ops_.deep_embed(args, at.stream));
  Product gate = To(hidden_, w.matrix(Role::kDeepEmbedUp), deep_y_.data(), Activation::kNone,
                    w.vector(Role::kDeepEmbedBias).data());
  gate.gate = hidden_.data();
  return Products(at, {gate});
}

absl::Status Rwkv7Stage::PrepareStep(const StageStep& step, const StateView& state, kernels::Stream& stream) {
  return has_attention_ ? MakeRows(step, state, stream) : absl::OkStatus();
}

absl::Status Rwkv7Stage::BeginStep(const kernels::StepRows& rows, kernels::Stream& stream) {
  if (has_deep_embed_) return Embed(rows.tokens, rows.rows, embedded_.data(), stream);
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
  const auto is_sequence = [](const kernels::SequenceSpan& span) { return span.slot != kernels::kPaddingSlot; };
  constexpr auto kFloatBytes = static_cast<int64_t>(sizeof(float));
  for (size_t s = 0; s < step.spans.size(); ++s) {
    if (!is_sequence(step.spans[s])) continue;
    const float* const length = state.tensor(0, kLength).of(step.spans[s].slot);
    RWKV_RETURN_IF_ERROR(stream.Copy(pinned_lengths_.data() + s, length, kFloatBytes));
  }
  RWKV_RETURN_IF_ERROR(stream.Synchronize());
  for (size_t s = 0; s < step.spans.size(); ++s) {
    const float cached = pinned_lengths_.data()[s];
    if (!is_sequence(step.spans[s]) || !(cached >= 0 && cached <= static_cast<float>(options_.deep_embed_context))) {
      continue;
    }
    const auto count = static_cast<int64_t>(cached);
    RWKV_RETURN_IF_ERROR(
        stream.Copy(pinned_cache_.data(), state.tensor(0, kTokenCache).of(step.spans[s].slot), count * kFloatBytes));
    RWKV_RETURN_IF_ERROR(stream.Synchronize());
    for (int64_t t = 0; t < count; ++t) {
      const float id = pinned_cache_.data()[t];
      if (id >= 0 && id < static_cast<float>(has_row_.size())) need(static_cast<int32_t>(id));
    }
  }
  for (size_t begin = 0; begin < missing_.size(); begin += options_.max_rows) {
    const absl::Span<const int32_t> ids = absl::MakeConstSpan(missing_).subspan(begin, options_.max_rows);
    const auto count = static_cast<int64_t>(ids.size());
    std::copy(ids.begin(), ids.end(), pinned_ids_.data());
    RWKV_RETURN_IF_ERROR(stream.Copy(ids_.data(), pinned_ids_.data(), count * static_cast<int64_t>(sizeof(int32_t))));
    RWKV_RETURN_IF_ERROR(Embed(ids_.data(), count, embedded_.data(), stream));
    for (Tables& tables : tables_) {
      for (MergedTable* table : {&tables.key, &tables.value}) {
        RWKV_RETURN_IF_ERROR(table->Make(ops_, ids, ids_.data(), embedded_.data(), made_.data(), stream));
      }
    }
    RWKV_RETURN_IF_ERROR(stream.Synchronize());  // The pinned ids are written again.
  }
  return absl::OkStatus();
}

absl::Status Rwkv7Stage::AddAttention(const LayerStep& at) {
  const WeightSet& w = at.weights;
  const Tables& tables = tables_[at.layer - weights_->layers().begin];
  RWKV_RETURN_IF_ERROR(Products(
      at, {To(query_, w.matrix(Role::kQuery), at.step.x), To(cache_key_, w.matrix(Role::kCacheKeyDown), at.step.x),
           To(cache_value_, w.matrix(Role::kCacheValueDown), at.step.x)}));
  kernels::DeepEmbedAttentionArgs args;
  args.step = &at.rows;
  args.vocabulary = weights_->config().vocab_size;
  args.capacity = options_.deep_embed_context;
  args.length = at.state[kLength];
  args.token_cache = at.state[kTokenCache];
  args.key_cache = at.state[kKeyCache];
  args.value_cache = at.state[kValueCache];
  args.q_previous = at.state[kLastQuery];
  args.k2 = &w.matrix(Role::kCacheKeyUp);
  args.v2 = &w.matrix(Role::kCacheValueUp);
  args.k_emb = tables.key.rows();
  args.v_emb = tables.value.rows();
  args.x_q = w.vector(Role::kQueryShift).data();
  args.x_k = w.vector(Role::kKeyShift).data();
  args.x_v = w.vector(Role::kValueShift).data();
  args.lnq_weight = w.norm(Role::kLnQuery).weight.data();
  args.lnq_bias = w.norm(Role::kLnQuery).bias.data();
  args.lnk_weight = w.norm(Role::kLnKey).weight.data();
  args.lnk_bias = w.norm(Role::kLnKey).bias.data();
  args.lnv_weight = w.norm(Role::kLnValue).weight.data();
  args.lnv_bias = w.norm(Role::kLnValue).bias.data();
  args.q = query_.data();
  args.key = cache_key_.data();
  args.value = cache_value_.data();
  args.y = at.step.x;
  return ops_.deep_embed_attention(args, at.stream);
}

}  // namespace rwkv::worker
