#include "services/worker/model/weights.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "kernels/api/op_table.h"
#include "kernels/base/dtype.h"
#include "kernels/base/finite.h"
#include "kernels/base/ggml_blocks.h"
#include "kernels/base/status_macros.h"
#include "kernels/base/stream.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/formats/tensor_record.h"
#include "services/common/parallel.h"

namespace rwkv::worker {
namespace {

// Threads that read and check matrices while a worker starts: more would wait for memory.
constexpr unsigned kReadAtOnce = 8;

absl::Status CheckDevice(const kernels::Device& device, const checkpoint::ModelConfig& config) {
  const kernels::OpTable& ops = device.ops();
  if (config.version == checkpoint::ModelVersion::k7b && ops.deep_embed_attention == nullptr) {
    return absl::UnimplementedError(absl::StrCat(device.name(), ": a model of RWKV-", Name(config.version),
                                                 " needs deep_embed_attention, which this device has not"));
  }
  const int64_t attention_channels = config.version == checkpoint::ModelVersion::k7b
                                         ? config.width + config.layer_sizes[0][checkpoint::Size::kQueryWidth]
                                         : 0;
  if (attention_channels > ops.max_attention_channels) {
    return absl::UnimplementedError(absl::StrCat(device.name(), ": width and query width of the model, ",
                                                 attention_channels, " together, are more than ",
                                                 ops.max_attention_channels, ", the most on this device"));
  }
  if (config.head_size > ops.max_head_size) {
    return absl::UnimplementedError(absl::StrCat(device.name(), ": the model's head_size ", config.head_size,
                                                 " is more than ", ops.max_head_size, ", the largest on this device"));
  }
  return absl::OkStatus();
}

absl::Status NotOfTheConfig(const checkpoint::Checkpoint& checkpoint, absl::string_view name, int64_t elements) {
  const checkpoint::TensorInfo* info = checkpoint.Find(name);
  return absl::FailedPreconditionError(
      absl::StrCat(checkpoint.path(), ": tensor ", checkpoint::Quoted(name), " is ",
                   info == nullptr ? "not there" : checkpoint::ElementTypeName(info->type), " ",
                   info == nullptr ? "" : checkpoint::ShapeString(info->shape), ", not the ", elements,
                   " weights of the model's config"));
}

// `data` are the tensor's elements. kDataLoss: one is not finite.
absl::Status CheckFinite(const checkpoint::Checkpoint& checkpoint, const checkpoint::TensorInfo& info,
                         kernels::DType dtype, const void* data) {
  const int64_t index = kernels::FindNotFinite(dtype, data, info.bytes / kernels::SizeOf(dtype));
  if (index < 0) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat(checkpoint.path(), ": element ", index, " of tensor ", checkpoint::Quoted(info.name), " of shape ",
                   checkpoint::ShapeString(info.shape), " is ", kernels::LoadAsFloat(dtype, data, index)));
}

// The same of ggml's blocks, whose weights are finite if their fp16 scales are.
absl::Status CheckFinite(const checkpoint::Checkpoint& checkpoint, const checkpoint::Tensor& tensor) {
  const int64_t block_bytes = kernels::BlockBytes(tensor.blocks);
  const int64_t halves = kernels::HasMinimumScale(tensor.blocks) ? 2 : 1;
  const char* const scales = static_cast<const char*>(tensor.data) + kernels::ScaleOffset(tensor.blocks);
  for (int64_t block = 0; block < tensor.bytes / block_bytes; ++block) {
    for (int64_t i = 0; i < halves; ++i) {
      const float scale = kernels::LoadAsFloat(kernels::DType::kFloat16, scales + block * block_bytes, i);
      if (std::isfinite(scale)) continue;
      return absl::DataLossError(absl::StrCat(checkpoint.path(), ": a scale of ", kernels::BlockTypeName(tensor.blocks),
                                              " block ", block, " of tensor ", checkpoint::Quoted(tensor.info->name),
                                              " is ", scale));
    }
  }
  return absl::OkStatus();
}

// A copy of a tensor's elements, all finite.
struct Elements {
  kernels::DType dtype;
  std::unique_ptr<uint8_t[]> data;
};

// Read, not mapped: what is copied leaves no page of the file in memory.
absl::StatusOr<Elements> ReadElements(const checkpoint::Checkpoint& checkpoint, absl::string_view name,
                                      int64_t elements) {
  const checkpoint::TensorInfo* info = checkpoint.Find(name);
  const absl::optional<kernels::DType> dtype = info == nullptr ? absl::nullopt : checkpoint::WeightDType(info->type);
  if (!dtype.has_value() || info->bytes != elements * kernels::SizeOf(*dtype)) {
    return NotOfTheConfig(checkpoint, name, elements);
  }
  Elements weight{*dtype, std::make_unique<uint8_t[]>(info->bytes)};
  RWKV_RETURN_IF_ERROR(checkpoint.ReadBytes(*info, 0, absl::MakeSpan(weight.data.get(), info->bytes)));
  RWKV_RETURN_IF_ERROR(CheckFinite(checkpoint, *info, *dtype, weight.data.get()));
  return weight;
}

// exp() in double and then rounded: the float is the same whatever the library's last bit.
float Transformed(checkpoint::Transform transform, float value) {
  switch (transform) {
    case checkpoint::Transform::kNone:
      return value;
    case checkpoint::Transform::kOneMinus:
      return 1.0f - value;
    case checkpoint::Transform::kExp:
      return static_cast<float>(std::exp(double{value}));
    case checkpoint::Transform::kMinusExp:
      return static_cast<float>(-std::exp(double{value}));
    case checkpoint::Transform::kExpMinusExp:
      return static_cast<float>(std::exp(-std::exp(double{value})));
  }
  return value;
}

// The embedding and DeepEmbed's tables are looked up by token, everything else is multiplied with; what comes to
// ffn.value has been through a squared ReLU.
kernels::WeightUse UseOf(Role role) {
  switch (role) {
    case Role::kEmbedding:
    case Role::kDeepEmbedTable:
    case Role::kKeyTable:
    case Role::kValueTable:
      return kernels::WeightUse::kRows;
    case Role::kFfnValue:
      return kernels::WeightUse::kSparseProduct;
    default:
      return kernels::WeightUse::kProduct;
  }
}

}  // namespace

// Reads a stage's tensors, checks them and has the device take them.
class WeightLoader {
 public:
  WeightLoader(StageWeights* weights, kernels::Device& device) : weights_(*weights), device_(device) {}

  absl::Status LoadAll();

 private:
  bool Wants(Role role) const;  // Of the model's own tensors.
  absl::Status LoadTensor(const checkpoint::ModelTensor& spec, absl::string_view prefix, const checkpoint::Sizes& sizes,
                          WeightSet* weights);
  absl::Status LoadVector(const checkpoint::ModelTensor& spec, const std::string& name, const checkpoint::Sizes& sizes,
                          DeviceFloats* out);
  absl::StatusOr<std::vector<float>> ReadVector(const checkpoint::ModelTensor& spec, const std::string& name,
                                                const checkpoint::Sizes& sizes) const;
  // `form` is the one in which the tensor's rows follow each other as [rows, cols].
  absl::StatusOr<kernels::MatrixView> ReadMatrix(const std::string& name, int64_t rows, int64_t cols,
                                                 checkpoint::Form form) const;
  // Codes of which `out` has the data and the sizes.
  absl::Status ReadQuantized(const checkpoint::TensorInfo& info, int64_t rows, int64_t cols,
                             kernels::MatrixView* out) const;
  // Scales or minimums of a quantized matrix.
  absl::Status ReadGroups(const std::string& name, int64_t rows, int64_t cols, int64_t* group,
                          const uint16_t** out) const;

  // A matrix that LoadMatrices reads: one weight, or the `parts` factors of a stack that lie below each other in it.
  struct MatrixJob {
    std::string name;
    int64_t rows;
    int64_t cols;
    checkpoint::Form form;
    kernels::WeightUse use;
    int64_t parts;  // Of a stack; 0: no stack.
    kernels::Weight* weight;
    std::vector<kernels::Weight>* stack;
    kernels::MatrixView matrix;
  };
  // Several at a time are read and checked, then the device takes them in the order of the jobs.
  absl::Status LoadMatrices();

  StageWeights& weights_;
  kernels::Device& device_;
  const checkpoint::Checkpoint& checkpoint_ = *weights_.checkpoint_;
  std::vector<MatrixJob> matrices_;
  std::unique_ptr<kernels::Stream> stream_;
  DeviceFloats staging_;  // Pinned.
};

StageWeights::StageWeights(std::shared_ptr<const checkpoint::Checkpoint> checkpoint,
                           const checkpoint::ModelConfig& config, LayerRange layers)
    : checkpoint_(std::move(checkpoint)), config_(config), layers_(layers) {}

absl::StatusOr<std::unique_ptr<const StageWeights>> StageWeights::Load(
    std::shared_ptr<const checkpoint::Checkpoint> checkpoint, const checkpoint::ModelConfig& config, LayerRange layers,
    kernels::Device& device) {
  if (layers.begin < 0 || layers.begin >= layers.end || layers.end > config.layer_count) {
    return absl::InvalidArgumentError(
        absl::StrCat("layers ", layers.ToString(), " are not a part of the model's 0:", config.layer_count));
  }
  RWKV_RETURN_IF_ERROR(CheckDevice(device, config));
  std::unique_ptr<StageWeights> weights(new StageWeights(std::move(checkpoint), config, layers));
  RWKV_RETURN_IF_ERROR(WeightLoader(weights.get(), device).LoadAll());
  return std::unique_ptr<const StageWeights>(std::move(weights));
}

bool WeightLoader::Wants(Role role) const {
  switch (role) {
    case Role::kEmbedding:
      return weights_.is_first() || checkpoint::HasDeepEmbed(weights_.config_.version);
    case Role::kLn0:
      return Wants(Role::kEmbedding) && !weights_.config_.embedding_is_normalised;
    default:
      return weights_.is_last();
  }
}

absl::Status WeightLoader::LoadAll() {
  RWKV_ASSIGN_OR_RETURN(stream_, device_.NewStream());
  for (const checkpoint::ModelTensor& spec : checkpoint::ModelTensors()) {
    if (Wants(spec.role))
      RWKV_RETURN_IF_ERROR(
          LoadTensor(spec, "", weights_.config_.layer_sizes[weights_.layers_.begin], &weights_.model_));
  }
  weights_.layer_weights_.resize(weights_.layers_.size());
  for (int layer = weights_.layers_.begin; layer < weights_.layers_.end; ++layer) {
    const std::string prefix = absl::StrCat("blocks.", layer, ".");
    const absl::Span<const checkpoint::ModelTensor> specs = checkpoint::LayerTensors(weights_.config_.version);
    for (size_t i = 0; i < specs.size(); ++i) {
      const checkpoint::ModelTensor& spec = specs[i];
      if (spec.presence == checkpoint::Presence::kNotInLayer0 && layer == 0) continue;
      const bool may_be_absent = spec.presence == checkpoint::Presence::kOptional ||
                                 (i > 0 && specs[i - 1].role == spec.role) ||
                                 (i + 1 < specs.size() && specs[i + 1].role == spec.role);
      if (may_be_absent && checkpoint_.Find(absl::StrCat(prefix, spec.name)) == nullptr) continue;
      RWKV_RETURN_IF_ERROR(LoadTensor(spec, prefix, weights_.config_.layer_sizes[layer],
                                      &weights_.layer_weights_[layer - weights_.layers_.begin]));
    }
  }
  return LoadMatrices();
}

absl::Status WeightLoader::LoadTensor(const checkpoint::ModelTensor& spec, absl::string_view prefix,
                                      const checkpoint::Sizes& sizes, WeightSet* weights) {
  const std::string name = absl::StrCat(prefix, spec.name);
  const int role = static_cast<int>(spec.role);
  const auto size = [&](int dimension) { return sizes[spec.shape[dimension]]; };
  const auto add = [&](int64_t rows, int64_t cols, checkpoint::Form form, int64_t parts) {
    matrices_.push_back(
        {name, rows, cols, form, UseOf(spec.role), parts, &weights->matrices_[role], &weights->stacks_[role], {}});
  };
  switch (spec.kind) {
    case checkpoint::Kind::kNorm:
      RWKV_RETURN_IF_ERROR(LoadVector(spec, absl::StrCat(name, ".weight"), sizes, &weights->norms_[role].weight));
      return LoadVector(spec, absl::StrCat(name, ".bias"), sizes, &weights->norms_[role].bias);
    case checkpoint::Kind::kVector:
    case checkpoint::Kind::kHeadVector:
      if (spec.role == Role::kInitialState) {
        RWKV_ASSIGN_OR_RETURN(weights->initial_state_, ReadVector(spec, name, sizes));
        return absl::OkStatus();
      }
      return LoadVector(spec, name, sizes, &weights->vectors_[role]);
    case checkpoint::Kind::kMatrix:
      add(size(0), size(1), checkpoint::Form::kMatrix, 0);
      return absl::OkStatus();
    case checkpoint::Kind::kLowRank:
      add(size(1), size(0), checkpoint::Form::kTransposed, spec.shape[1] == checkpoint::Size::kFiveMixRanks ? 5 : 0);
      return absl::OkStatus();
    case checkpoint::Kind::kLowRankStack:
      add(size(0) * size(2), size(1), checkpoint::Form::kTransposed, size(0));
      return absl::OkStatus();
  }
  return absl::InternalError(absl::StrCat("tensor ", name, " is of no kind"));
}

absl::Status WeightLoader::LoadMatrices() {
  const size_t at_once = std::min(kReadAtOnce, std::max(std::thread::hardware_concurrency(), 1u));
  RWKV_RETURN_IF_ERROR(common::RunInParallel(
      matrices_.size(), at_once,
      [this](size_t i) {
        MatrixJob& job = matrices_[i];
        RWKV_ASSIGN_OR_RETURN(job.matrix, ReadMatrix(job.name, job.rows, job.cols, job.form));
        return absl::OkStatus();
      },
      [](size_t) {}));
  for (const MatrixJob& job : matrices_) {
    if (job.parts == 0) {
      RWKV_ASSIGN_OR_RETURN(*job.weight, device_.Load(job.matrix, job.use));
      if (job.weight->matrix.data != job.matrix.data) checkpoint_.Forget(job.name, job.form);
      continue;
    }
    const int64_t rows = job.rows / job.parts;
    for (int64_t part = 0; part < job.parts; ++part) {
      RWKV_ASSIGN_OR_RETURN(kernels::Weight factor,
                            device_.Load(kernels::RowsOf(job.matrix, part * rows, rows), job.use));
      job.stack->push_back(std::move(factor));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> WeightLoader::ReadVector(const checkpoint::ModelTensor& spec,
                                                            const std::string& name,
                                                            const checkpoint::Sizes& sizes) const {
  int64_t elements = 1;
  for (int i = 0; i < spec.rank(); ++i) elements *= sizes[spec.shape[i]];
  RWKV_ASSIGN_OR_RETURN(const Elements read, ReadElements(checkpoint_, name, elements));
  const int64_t copies = spec.kind == checkpoint::Kind::kHeadVector ? sizes[checkpoint::Size::kHeadSize] : 1;
  std::vector<float> values;
  values.reserve(elements * copies);
  for (int64_t i = 0; i < elements; ++i) {
    values.insert(values.end(), copies, Transformed(spec.transform, LoadAsFloat(read.dtype, read.data.get(), i)));
  }
  return values;
}

absl::Status WeightLoader::LoadVector(const checkpoint::ModelTensor& spec, const std::string& name,
                                      const checkpoint::Sizes& sizes, DeviceFloats* out) {
  RWKV_ASSIGN_OR_RETURN(const std::vector<float> values, ReadVector(spec, name, sizes));
  const auto count = static_cast<int64_t>(values.size());
  if (staging_.size() < count) {
    RWKV_ASSIGN_OR_RETURN(staging_, DeviceFloats::Create(device_, count, kernels::MemoryKind::kPinned));
  }
  RWKV_ASSIGN_OR_RETURN(*out, DeviceFloats::Create(device_, count));
  std::copy(values.begin(), values.end(), staging_.data());
  RWKV_RETURN_IF_ERROR(stream_->Copy(out->data(), staging_.data(), out->size_in_bytes()));
  return stream_->Synchronize();
}

absl::StatusOr<kernels::MatrixView> WeightLoader::ReadMatrix(const std::string& name, int64_t rows, int64_t cols,
                                                             checkpoint::Form form) const {
  const checkpoint::TensorInfo* info = checkpoint_.Find(name);
  if (info == nullptr) return NotOfTheConfig(checkpoint_, name, rows * cols);
  RWKV_ASSIGN_OR_RETURN(const checkpoint::Tensor tensor, checkpoint_.Read(name, form));
  const absl::optional<kernels::DType> dtype = checkpoint::WeightDType(info->type);
  kernels::MatrixView matrix;
  matrix.rows = rows;
  matrix.cols = cols;
  matrix.data = tensor.data;
  if (tensor.blocks != kernels::BlockType::kNone) {
    matrix.quantization = kernels::Quantization::kBlocks;
    matrix.blocks = tensor.blocks;
    if (cols % kernels::BlockWeights(tensor.blocks) != 0) return NotOfTheConfig(checkpoint_, name, rows * cols);
  } else if (dtype.has_value()) {
    matrix.dtype = *dtype;
  } else {
    RWKV_RETURN_IF_ERROR(ReadQuantized(*info, rows, cols, &matrix));
    return matrix;
  }
  if (tensor.bytes != rows * kernels::RowBytes(matrix)) return NotOfTheConfig(checkpoint_, name, rows * cols);
  RWKV_RETURN_IF_ERROR(tensor.blocks != kernels::BlockType::kNone
                           ? CheckFinite(checkpoint_, tensor)
                           : CheckFinite(checkpoint_, *info, *dtype, tensor.data));
  return matrix;
}

absl::Status WeightLoader::ReadQuantized(const checkpoint::TensorInfo& info, int64_t rows, int64_t cols,
                                         kernels::MatrixView* out) const {
  const bool is_int4 = info.type == checkpoint::ElementType::kUint8;
  out->dtype = kernels::DType::kFloat16;
  out->quantization = is_int4 ? kernels::Quantization::kInt4 : kernels::Quantization::kInt8;
  if ((!is_int4 && info.type != checkpoint::ElementType::kInt8) || info.bytes != rows * kernels::RowBytes(*out)) {
    return NotOfTheConfig(checkpoint_, info.name, rows * cols);
  }
  RWKV_RETURN_IF_ERROR(ReadGroups(absl::StrCat(info.name, ".scale"), rows, cols, &out->group, &out->scales));
  if (!is_int4) return absl::OkStatus();
  return ReadGroups(absl::StrCat(info.name, ".min"), rows, cols, &out->group, &out->minimums);
}

absl::Status WeightLoader::ReadGroups(const std::string& name, int64_t rows, int64_t cols, int64_t* group,
                                      const uint16_t** out) const {
  const checkpoint::TensorInfo* info = checkpoint_.Find(name);
  *group = info == nullptr || info->shape.size() != 2 ? 0 : checkpoint::QuantizationGroup(cols, info->shape[1]);
  if (*group == 0 || info->shape[0] != rows || info->type != checkpoint::ElementType::kFloat16) {
    return NotOfTheConfig(checkpoint_, name, rows);
  }
  RWKV_ASSIGN_OR_RETURN(const checkpoint::Tensor tensor, checkpoint_.Read(name));
  *out = static_cast<const uint16_t*>(tensor.data);
  return CheckFinite(checkpoint_, *info, kernels::DType::kFloat16, tensor.data);
}

}  // namespace rwkv::worker
