#include "services/worker/model/block/block_stage.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "kernels/api/embed.h"
#include "kernels/api/layer_norm.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/model_config.h"
#include "services/checkpoint/model_tensors.h"

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
    RWKV_ASSIGN_OR_RETURN(*buffer, Buffer::Create(device_, options_.max_rows * width));
  }
  return absl::OkStatus();
}

absl::Status BlockStage::AllocateShared(int shifts, int low_ranks) {
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
  RWKV_ASSIGN_OR_RETURN(step_rows_, kernels::StepRowsLoader::Create(device_, options_.max_rows, config.vocab_size));
  RWKV_RETURN_IF_ERROR(Allocate(config.width, {&normed_}));
  for (int i = 0; i < shifts; ++i) RWKV_RETURN_IF_ERROR(Allocate(config.width, {&shifted_[i]}));
  for (int i = 0; i < low_ranks; ++i) RWKV_RETURN_IF_ERROR(Allocate(largest_rank, {&low_rank_[i]}));
  return Allocate(config.ffn_width, {&hidden_});
}

namespace {

// Rows that the steps of a device that repeats are filled up to: few different numbers, and no more rows than products
// take at once anyway.
int64_t RowBucket(int64_t rows) {
  for (const int64_t bucket : {1, 2, 4, 8}) {
    if (rows <= bucket) return bucket;
  }
  const int64_t step = rows <= 64 ? 8 : 32;
  return (rows + step - 1) / step * step;
}

constexpr int64_t kMostRepeatedRows = 256;

}  // namespace

// One token each: such steps come again and again.
bool BlockStage::IsRepeated(const StageStep& step, const kernels::Stream& stream) const {
  return stream.Repeats() && static_cast<int64_t>(step.spans.size()) == step.rows && step.rows <= kMostRepeatedRows &&
         RowBucket(step.rows) <= options_.max_rows;
}

absl::Span<const int64_t> BlockStage::KeyOf(const StageStep& padded, const StateView& state) {
  key_.clear();
  for (const void* memory : {static_cast<const void*>(padded.x), static_cast<const void*>(padded.v_first),
                             static_cast<const void*>(padded.logits), static_cast<const void*>(padded.hidden),
                             static_cast<const void*>(state.tensor(0, 0).data)}) {
    key_.push_back(static_cast<int64_t>(reinterpret_cast<intptr_t>(memory)));
  }
  key_.push_back(padded.rows);
  key_.push_back(static_cast<int64_t>(padded.logit_rows.size()));
  key_.insert(key_.end(), padded.logit_rows.begin(), padded.logit_rows.end());
  key_.insert(key_.end(), padded.hidden_rows.begin(), padded.hidden_rows.end());
  return key_;
}

absl::Status BlockStage::Forward(const StageStep& step, const StateView& state, kernels::Stream& stream) {
  const bool repeats = IsRepeated(step, stream);
  const StageStep padded = repeats ? Pad(step, RowBucket(step.rows)) : step;
  RWKV_ASSIGN_OR_RETURN(
      const kernels::StepRows rows,
      step_rows_->Load(padded.spans, absl::MakeConstSpan(padded.tokens, padded.rows), state.slots, stream));
  RWKV_RETURN_IF_ERROR(PrepareStep(padded, state, stream));
  if (!repeats) return Compute(padded, rows, state, stream);
  return stream.Repeat(KeyOf(padded, state), [&] { return Compute(padded, rows, state, stream); });
}

absl::Status BlockStage::PrepareSteps(const StageStep& step, int64_t rows, const StateView& state,
                                      kernels::RepeatingStream& stream) {
  const kernels::SequenceSpan nobody = {kernels::kPaddingSlot, 0, 1};
  const int32_t token = 0;
  const int64_t row = 0;
  StageStep one = step;
  one.spans = absl::MakeConstSpan(&nobody, 1);
  one.rows = 1;
  one.tokens = &token;
  if (!step.logit_rows.empty()) one.logit_rows = absl::MakeConstSpan(&row, 1);
  for (int64_t bucket = 1; bucket <= RowBucket(rows); bucket = RowBucket(bucket + 1)) {
    const StageStep padded = Pad(one, bucket);
    if (!IsRepeated(padded, stream)) break;
    RWKV_ASSIGN_OR_RETURN(
        const kernels::StepRows loaded,
        step_rows_->Load(padded.spans, absl::MakeConstSpan(padded.tokens, padded.rows), state.slots, stream));
    RWKV_RETURN_IF_ERROR(PrepareStep(padded, state, stream));
    stream.Prepare(KeyOf(padded, state), [&] { return Compute(padded, loaded, state, stream); });
  }
  return absl::OkStatus();
}

StageStep BlockStage::Pad(const StageStep& step, int64_t rows) {
  StageStep padded = step;
  padded.rows = rows;
  padded_spans_.assign(step.spans.begin(), step.spans.end());
  padded_tokens_.assign(step.tokens, step.tokens + step.rows);
  for (int64_t row = step.rows; row < padded.rows; ++row) {
    padded_spans_.push_back({kernels::kPaddingSlot, row, 1});
    padded_tokens_.push_back(0);
  }
  padded.spans = padded_spans_;
  padded.tokens = padded_tokens_.data();
  // The room for logits is that of all rows.
  if (static_cast<int64_t>(step.logit_rows.size()) == step.rows) {
    padded_logit_rows_.resize(padded.rows);
    std::iota(padded_logit_rows_.begin(), padded_logit_rows_.end(), 0);
    padded.logit_rows = padded_logit_rows_;
  }
  return padded;
}

absl::Status BlockStage::Compute(const StageStep& step, const kernels::StepRows& rows, const StateView& state,
                                 kernels::Stream& stream) {
  if (weights_->is_first()) RWKV_RETURN_IF_ERROR(Embed(rows.tokens, rows.rows, step.x, stream));
  RWKV_RETURN_IF_ERROR(BeginStep(rows, stream));
  for (int layer = weights_->layers().begin; layer < weights_->layers().end; ++layer) {
    const kernels::StateTensor* const tensors = &state.tensor(layer - weights_->layers().begin, 0);
    const LayerStep at = {layer, weights_->layer(layer), tensors, step, rows, stream};
    RWKV_RETURN_IF_ERROR(TimeMix(at));
    RWKV_RETURN_IF_ERROR(ChannelMix(at));
  }
  if (!weights_->is_last()) return absl::OkStatus();
  RWKV_RETURN_IF_ERROR(FinalNorm(step.hidden_rows, step.x, step.hidden, stream));
  return step.logit_rows.empty() ? absl::OkStatus() : Logits(step, stream);
}

absl::Status BlockStage::Embed(const int32_t* tokens, int64_t rows, float* y, kernels::Stream& stream) const {
  kernels::EmbedArgs args;
  args.rows = rows;
  args.tokens = tokens;
  args.embedding = &weights_->embedding();
  args.weight = weights_->ln0().weight.data();
  args.bias = weights_->ln0().bias.data();
  args.x = y;
  return ops_.embed(args, stream);
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
  Product head;
  head.weight = &weights_->head();
  head.x = normed_.data();
  head.y = step.logits;
  return ops_.products({static_cast<int64_t>(step.logit_rows.size()), &head, 1}, stream);
}

absl::Status BlockStage::GatedChannelMix(const LayerStep& at, int state_tensor) {
  RWKV_RETURN_IF_ERROR(MixInput(at, Role::kLn2, state_tensor, {Role::kFfnShiftK, Role::kFfnShiftR}));
  RWKV_RETURN_IF_ERROR(
      Products(at, {To(hidden_, at.weights.matrix(Role::kFfnKey), shifted_[0].data(), Activation::kSquaredRelu),
                    To(normed_, at.weights.matrix(Role::kFfnReceptance), shifted_[1].data(), Activation::kSigmoid)}));
  return AddProduct(at, at.weights.matrix(Role::kFfnValue), hidden_.data(), normed_.data());
}

kernels::MixInputArgs BlockStage::MixInputArgs(const LayerStep& at, Role norm, int state_tensor,
                                               std::initializer_list<Role> mixes) const {
  kernels::MixInputArgs args;
  args.step = &at.rows;
  args.width = weights_->config().width;
  args.x = at.step.x;
  args.weight = at.weights.norm(norm).weight.data();
  args.bias = at.weights.norm(norm).bias.data();
  args.shift = at.state[state_tensor];
  for (Role role : mixes) {
    args.mix[args.outputs] = at.weights.vector(role).data();
    args.y[args.outputs] = shifted_[args.outputs].data();
    ++args.outputs;
  }
  return args;
}

absl::Status BlockStage::MixInput(const LayerStep& at, Role norm, int state_tensor,
                                  std::initializer_list<Role> mixes) const {
  return ops_.mix_input(MixInputArgs(at, norm, state_tensor, mixes), at.stream);
}

absl::Status BlockStage::Products(const LayerStep& at, absl::Span<const Product> products) const {
  return ops_.products({at.rows.rows, products.data(), static_cast<int64_t>(products.size())}, at.stream);
}

kernels::Product BlockStage::To(const Buffer& y, const kernels::Weight& weight, const float* x, Activation activation,
                                const float* bias) {
  Product product;
  product.weight = &weight;
  product.x = x;
  product.bias = bias;
  product.activation = activation;
  product.y = y.data();
  return product;
}

absl::Status BlockStage::AddProduct(const LayerStep& at, const kernels::Weight& weight, const float* x,
                                    const float* gate) const {
  Product product;
  product.weight = &weight;
  product.x = x;
  product.gate = gate;
  product.accumulate = true;
  product.y = at.step.x;
  return Products(at, {product});
}

}  // namespace rwkv::worker
