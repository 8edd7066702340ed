#include "services/worker/model/weights.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "kernels/base/dtype.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::worker {
namespace {

// An element is NaN or infinite when all bits of its exponent are set. A whole block is tested before anybody looks for
// the culprit, so that the loop has no exit and vectorises.
template <typename Bits>
int64_t FindNotFinite(const void* data, int64_t count, Bits exponent) {
  constexpr int64_t kBlock = 4096;
  const char* bytes = static_cast<const char*>(data);
  Bits block[kBlock];
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = std::min(kBlock, count - start);
    std::memcpy(block, bytes + start * sizeof(Bits), size * sizeof(Bits));
    Bits found = 0;
    for (int64_t i = 0; i < size; ++i) found |= static_cast<Bits>((block[i] & exponent) == exponent);
    if (found == 0) continue;
    for (int64_t i = 0; i < size; ++i) {
      if ((block[i] & exponent) == exponent) return start + i;
    }
  }
  return -1;
}

int64_t FindNotFinite(kernels::DType dtype, const void* data, int64_t count) {
  switch (dtype) {
    case kernels::DType::kFloat32:
      return FindNotFinite<uint32_t>(data, count, 0x7f800000);
    case kernels::DType::kBFloat16:
      return FindNotFinite<uint16_t>(data, count, 0x7f80);
    case kernels::DType::kFloat16:
      return FindNotFinite<uint16_t>(data, count, 0x7c00);
  }
  return -1;
}

// A tensor known to be a weight, with all its elements finite.
struct Weight {
  kernels::DType dtype;
  int64_t elements;
  const void* data;
};

// Not to be called with a config of another checkpoint; then kFailedPrecondition.
absl::StatusOr<Weight> ReadWeight(const checkpoint::Checkpoint& checkpoint, absl::string_view name, int64_t elements) {
  RWKV_ASSIGN_OR_RETURN(const checkpoint::Tensor tensor, checkpoint.Read(name));
  const absl::optional<kernels::DType> dtype = checkpoint::WeightDType(tensor.info->type);
  if (!dtype.has_value() || tensor.info->bytes != elements * kernels::SizeOf(*dtype)) {
    return absl::FailedPreconditionError(absl::StrCat(checkpoint.path(), ": tensor ", checkpoint::Quoted(name), " is ",
                                                      checkpoint::ElementTypeName(tensor.info->type), " ",
                                                      checkpoint::ShapeString(tensor.info->shape), ", not the ",
                                                      elements, " weights of the model's config"));
  }
  const Weight weight{*dtype, elements, tensor.data};
  if (const int64_t index = FindNotFinite(weight.dtype, weight.data, weight.elements); index >= 0) {
    return absl::DataLossError(absl::StrCat(
        checkpoint.path(), ": element ", index, " of tensor ", checkpoint::Quoted(name), " of shape ",
        checkpoint::ShapeString(tensor.info->shape), " is ", kernels::LoadAsFloat(weight.dtype, weight.data, index)));
  }
  return weight;
}

template <typename Bits>
void Transpose(const void* source, int64_t rows, int64_t cols, void* destination) {
  const char* in = static_cast<const char*>(source);
  char* out = static_cast<char*>(destination);
  constexpr int64_t kSize = sizeof(Bits);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      std::memcpy(out + (col * rows + row) * kSize, in + (row * cols + col) * kSize, kSize);
    }
  }
}

}  // namespace

StageWeights::StageWeights(std::shared_ptr<const checkpoint::Checkpoint> checkpoint,
                           const checkpoint::ModelConfig& config, LayerRange layers)
    : checkpoint_(std::move(checkpoint)), config_(config), layers_(layers) {}

absl::StatusOr<std::unique_ptr<const StageWeights>> StageWeights::Load(
    std::shared_ptr<const checkpoint::Checkpoint> checkpoint, const checkpoint::ModelConfig& config,
    LayerRange layers) {
  if (layers.begin < 0 || layers.begin >= layers.end || layers.end > config.layer_count) {
    return absl::InvalidArgumentError(
        absl::StrCat("layers ", layers.ToString(), " are not a part of the model's 0:", config.layer_count));
  }
  std::unique_ptr<StageWeights> weights(new StageWeights(std::move(checkpoint), config, layers));
  RWKV_RETURN_IF_ERROR(weights->LoadAll());
  return std::unique_ptr<const StageWeights>(std::move(weights));
}

absl::Status StageWeights::LoadAll() {
  if (is_first()) {
    RWKV_RETURN_IF_ERROR(LoadMatrix("emb.weight", config_.vocab_size, config_.width, &embedding_));
    if (!config_.embedding_is_normalised) RWKV_RETURN_IF_ERROR(LoadNorm("blocks.0.ln0", config_.width, &ln0_));
  }
  layer_weights_.resize(layers_.size());
  for (int layer = layers_.begin; layer < layers_.end; ++layer) {
    RWKV_RETURN_IF_ERROR(LoadLayer(layer, &layer_weights_[layer - layers_.begin]));
  }
  if (is_last()) {
    RWKV_RETURN_IF_ERROR(LoadNorm("ln_out", config_.width, &ln_out_));
    RWKV_RETURN_IF_ERROR(LoadMatrix("head.weight", config_.vocab_size, config_.width, &head_));
  }
  return absl::OkStatus();
}

absl::Status StageWeights::LoadLayer(int layer, LayerWeights* weights) {
  const int64_t D = config_.width;
  const int64_t A = config_.attention_width;
  const int64_t F = config_.ffn_width;
  const int64_t N = config_.head_size;
  const checkpoint::ModelConfig::Ranks& ranks = config_.ranks[layer];
  const std::string block = absl::StrCat("blocks.", layer, ".");

  RWKV_RETURN_IF_ERROR(LoadNorm(absl::StrCat(block, "ln1"), D, &weights->ln1));
  RWKV_RETURN_IF_ERROR(LoadNorm(absl::StrCat(block, "ln2"), D, &weights->ln2));
  RWKV_RETURN_IF_ERROR(LoadNorm(absl::StrCat(block, "att.ln_x"), A, &weights->ln_x));

  struct VectorPlace {
    const char* name;
    int64_t size;
    std::vector<float>* vector;
  };
  std::vector<VectorPlace> vectors = {
      {"att.x_r", D, &weights->x_r}, {"att.x_w", D, &weights->x_w}, {"att.x_k", D, &weights->x_k},
      {"att.x_v", D, &weights->x_v}, {"att.x_a", D, &weights->x_a}, {"att.x_g", D, &weights->x_g},
      {"att.w0", A, &weights->w0},   {"att.a0", A, &weights->a0},   {"att.k_k", A, &weights->k_k},
      {"att.k_a", A, &weights->k_a}, {"att.r_k", A, &weights->r_k}, {"ffn.x_k", D, &weights->ffn_x_k},
  };
  if (layer > 0) vectors.push_back({"att.v0", A, &weights->v0});
  if (config_.has_initial_state[layer]) vectors.push_back({"att.time_state", A * N, &weights->initial_state});
  for (const VectorPlace& place : vectors) {
    RWKV_RETURN_IF_ERROR(LoadVector(absl::StrCat(block, place.name), place.size, place.vector));
  }

  struct MatrixPlace {
    const char* name;
    int64_t rows;  // Of the matrix to be, [out, in].
    int64_t cols;
    kernels::MatrixView* matrix;
  };
  const MatrixPlace matrices[] = {
      {"att.receptance.weight", A, D, &weights->receptance}, {"att.key.weight", A, D, &weights->key},
      {"att.value.weight", A, D, &weights->value},           {"att.output.weight", D, A, &weights->output},
      {"ffn.key.weight", F, D, &weights->ffn_key},           {"ffn.value.weight", D, F, &weights->ffn_value},
  };
  for (const MatrixPlace& place : matrices) {
    RWKV_RETURN_IF_ERROR(LoadMatrix(absl::StrCat(block, place.name), place.rows, place.cols, place.matrix));
  }
  std::vector<MatrixPlace> low_rank = {
      {"att.w1", ranks.decay, D, &weights->w1}, {"att.w2", A, ranks.decay, &weights->w2},
      {"att.a1", ranks.iclr, D, &weights->a1},  {"att.a2", A, ranks.iclr, &weights->a2},
      {"att.g1", ranks.gate, D, &weights->g1},  {"att.g2", A, ranks.gate, &weights->g2},
  };
  if (layer > 0) {
    low_rank.push_back({"att.v1", ranks.value_residual, D, &weights->v1});
    low_rank.push_back({"att.v2", A, ranks.value_residual, &weights->v2});
  }
  for (const MatrixPlace& place : low_rank) {
    RWKV_RETURN_IF_ERROR(LoadTransposed(absl::StrCat(block, place.name), place.rows, place.cols, place.matrix));
  }
  return absl::OkStatus();
}

absl::Status StageWeights::LoadVector(const std::string& name, int64_t size, std::vector<float>* out) {
  RWKV_ASSIGN_OR_RETURN(const Weight weight, ReadWeight(*checkpoint_, name, size));
  out->resize(size);
  kernels::WidenToFloat(weight.dtype, weight.data, size, out->data());
  return absl::OkStatus();
}

absl::Status StageWeights::LoadNorm(const std::string& prefix, int64_t size, NormWeights* out) {
  RWKV_RETURN_IF_ERROR(LoadVector(absl::StrCat(prefix, ".weight"), size, &out->weight));
  return LoadVector(absl::StrCat(prefix, ".bias"), size, &out->bias);
}

absl::Status StageWeights::LoadMatrix(const std::string& name, int64_t rows, int64_t cols, kernels::MatrixView* out) {
  RWKV_ASSIGN_OR_RETURN(const Weight weight, ReadWeight(*checkpoint_, name, rows * cols));
  *out = kernels::MatrixView{weight.dtype, rows, cols, weight.data};
  return absl::OkStatus();
}

absl::Status StageWeights::LoadTransposed(const std::string& name, int64_t rows, int64_t cols,
                                          kernels::MatrixView* out) {
  RWKV_ASSIGN_OR_RETURN(const Weight weight, ReadWeight(*checkpoint_, name, rows * cols));
  auto memory = std::make_unique<uint8_t[]>(weight.elements * kernels::SizeOf(weight.dtype));
  if (weight.dtype == kernels::DType::kFloat32) {
    Transpose<uint32_t>(weight.data, cols, rows, memory.get());
  } else {
    Transpose<uint16_t>(weight.data, cols, rows, memory.get());
  }
  *out = kernels::MatrixView{weight.dtype, rows, cols, memory.get()};
  transposed_.push_back(std::move(memory));
  return absl::OkStatus();
}

}  // namespace rwkv::worker
