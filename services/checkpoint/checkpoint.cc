#include "services/checkpoint/checkpoint.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "kernels/base/dtype.h"
#include "kernels/base/ggml_blocks.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/dialects/gguf_dialect.h"
#include "services/checkpoint/formats/tensor_reader.h"

namespace rwkv::checkpoint {
namespace {

std::vector<int64_t> RowMajorStrides(absl::Span<const int64_t> shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, shape[i]);
  return strides;
}

// Multiplies every weight by 2^exponent.
void ScaleBlocks(BlockType type, int exponent, absl::Span<uint8_t> blocks) {
  const float factor = std::ldexp(1.0f, exponent);
  const int64_t halves = HasMinimumScale(type) ? 2 : 1;
  for (size_t at = ScaleOffset(type); at < blocks.size(); at += BlockBytes(type)) {
    float values[2];
    kernels::WidenToFloat(kernels::DType::kFloat16, &blocks[at], halves, values);
    for (int64_t i = 0; i < halves; ++i) values[i] *= factor;
    kernels::NarrowFromFloat(kernels::DType::kFloat16, values, halves, &blocks[at]);
  }
}

std::vector<int64_t> WithoutUnits(std::vector<int64_t> shape) {
  shape.erase(std::remove(shape.begin(), shape.end(), 1), shape.end());
  return shape;
}

// `from` [rows, cols] to `to` [cols, rows], whose rows follow each other at `stride` elements.
template <typename Element>
void TransposeElements(const uint8_t* from, int64_t rows, int64_t cols, int64_t stride, uint8_t* to) {
  constexpr int64_t kColsAtOnce = 32;  // As many lines are written side by side.
  constexpr int64_t kSize = sizeof(Element);
  for (int64_t begin = 0; begin < cols; begin += kColsAtOnce) {
    const int64_t end = std::min(begin + kColsAtOnce, cols);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = begin; col < end; ++col) {
        std::memcpy(to + (col * stride + row) * kSize, from + (row * cols + col) * kSize, kSize);
      }
    }
  }
}

void Transpose(int64_t size, const uint8_t* from, int64_t rows, int64_t cols, int64_t stride, uint8_t* to) {
  switch (size) {
    case 1:
      return TransposeElements<uint8_t>(from, rows, cols, stride, to);
    case 2:
      return TransposeElements<uint16_t>(from, rows, cols, stride, to);
    case 4:
      return TransposeElements<uint32_t>(from, rows, cols, stride, to);
    default:
      return TransposeElements<uint64_t>(from, rows, cols, stride, to);
  }
}

}  // namespace

Checkpoint::Checkpoint(std::string path, std::unique_ptr<const Adapter> adapter)
    : path_(std::move(path)), adapter_(std::move(adapter)) {}

Checkpoint::~Checkpoint() = default;

absl::StatusOr<std::shared_ptr<const Checkpoint>> Checkpoint::Open(const std::string& path) {
  return Open(path, nullptr);
}

absl::StatusOr<std::shared_ptr<const Checkpoint>> Checkpoint::OpenWithAdapter(const std::string& path,
                                                                              const AdapterOptions& adapter) {
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<const Adapter> opened, Adapter::Open(adapter));
  return Open(path, std::move(opened));
}

absl::StatusOr<std::shared_ptr<const Checkpoint>> Checkpoint::Open(const std::string& path,
                                                                   std::unique_ptr<const Adapter> adapter) {
  RWKV_ASSIGN_OR_RETURN(const Shards shards, FindShards(path));
  std::shared_ptr<Checkpoint> checkpoint(new Checkpoint(path, std::move(adapter)));
  for (const std::string& shard : shards.files) {
    RWKV_ASSIGN_OR_RETURN(std::unique_ptr<MappedFile> file, OpenFile(shard));
    checkpoint->file_bytes_ += static_cast<int64_t>(file->bytes().size());
    checkpoint->files_.push_back(std::move(file));
  }
  if (absl::Status status = checkpoint->ReadDirectory(shards); !status.ok()) {
    return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
  }
  if (checkpoint->adapter_ == nullptr) return checkpoint;
  if (absl::Status status = checkpoint->AddAdapter(); !status.ok()) {
    return absl::Status(status.code(), absl::StrCat(checkpoint->adapter_->path(), ": ", status.message()));
  }
  return checkpoint;
}

absl::Status Checkpoint::ReadDirectory(const Shards& shards) {
  std::vector<ContainerFile> files;
  for (size_t i = 0; i < files_.size(); ++i) {
    files.push_back({files_[i]->bytes(), shards.files[i], shards.tensors.empty() ? nullptr : &shards.tensors[i]});
  }
  std::vector<ForgetBehind> forget;
  for (const auto& file : files_) forget.emplace_back(*file);
  const auto done = [&](size_t file, uint64_t offset, uint64_t size) { forget[file](offset, size); };
  RWKV_ASSIGN_OR_RETURN(container_, ReadContainer(files, done));
  for (const auto& file : files_) {  // A vocabulary in the directory takes megabytes.
    file->Forget(0, static_cast<int64_t>(file->bytes().size()));
  }
  for (TensorRecord& record : container_.records) {
    if (IsRowMajor(record)) record.strides.clear();
    RWKV_RETURN_IF_ERROR(AddTensor(record, *files_[record.shard]));
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::AddTensor(const TensorRecord& record, const MappedFile& file) {
  // The readers have checked that shapes fit their data, which a part of a block is smaller than.
  infos_.push_back({record.name, record.type, record.shape, *ByteCount(record.shape, record.type)});
  sources_.push_back({&record, &file, nullptr});
  if (record.part == BlockPart::kScales || record.part == BlockPart::kMinimums) return absl::OkStatus();
  // By elements, not by reach: a view with strides of zero would repeat a few bytes without end.
  const int64_t stored = record.blocks == BlockType::kNone
                             ? infos_.back().bytes
                             : infos_.back().bytes / PartBytes(record.blocks, record.part) * BlockBytes(record.blocks);
  if (__builtin_add_overflow(stored_bytes_, stored, &stored_bytes_) || stored_bytes_ / 2 > file_bytes()) {
    return absl::InvalidArgumentError(absl::StrCat("its tensors claim more than twice the file's ", file_bytes(),
                                                   " bytes, by sharing them (up to ", Quoted(record.name), ")"));
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::AddAdapter() {
  for (const TensorRecord& record : adapter_->replacements()) {
    const TensorInfo* info = Find(record.name);
    if (info == nullptr || WithoutUnits(info->shape) != WithoutUnits(record.shape)) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", Quoted(record.name), " of shape ", ShapeString(record.shape),
                       info == nullptr ? " is not in the model" : " would replace the model's of shape ",
                       info == nullptr ? "" : ShapeString(info->shape)));
    }
    TensorInfo& replaced = infos_[info - infos_.data()];
    replaced.type = record.type;
    replaced.bytes = *ByteCount(record.shape, record.type);
    sources_[info - infos_.data()] = {&record, &adapter_->file(), nullptr};
  }
  for (const Adapter::Update& update : adapter_->updates()) {
    const TensorInfo* info = Find(update.name);
    if (info == nullptr || !update.Fits(info->shape)) {
      return absl::InvalidArgumentError(
          absl::StrCat(Quoted(update.factor_name()), " changes a tensor ", Quoted(update.name),
                       info == nullptr ? ", which the model has not" : " of another shape; the model's has shape ",
                       info == nullptr ? "" : ShapeString(info->shape)));
    }
    if (!WeightDType(info->type).has_value()) {
      return absl::FailedPreconditionError(absl::StrCat(Quoted(update.factor_name()), " changes ", Quoted(update.name),
                                                        ", which is ", ElementTypeName(info->type), " in ", path_,
                                                        "; merge into a model of fp32, bf16 or fp16"));
    }
    sources_[info - infos_.data()].update = &update;
  }
  return absl::OkStatus();
}

const TensorInfo* Checkpoint::Find(absl::string_view name) const {
  const auto found = std::lower_bound(infos_.begin(), infos_.end(), name,
                                      [](const TensorInfo& info, absl::string_view key) { return info.name < key; });
  return found != infos_.end() && found->name == name ? &*found : nullptr;
}

TensorRecord Checkpoint::RecordOf(const TensorInfo& info, Form form) const {
  TensorRecord record = *SourceOf(info).record;
  if (form == Form::kPlain) return record;
  if (record.part == BlockPart::kQuants) {  // Of a pair: back to the blocks that it was made of.
    record.exponent = SourceOf(*Find(absl::StrCat(info.name, ".scale"))).record->exponent;
    record.shape.back() = record.shape.back() / PartBytes(record.blocks, record.part) * BlockWeights(record.blocks);
    record.part = BlockPart::kWeights;
    record.type = ElementType::kFloat32;
  }
  if (form != Form::kTransposed) return record;
  const size_t rank = record.shape.size();
  if (record.strides.empty()) record.strides = RowMajorStrides(record.shape);
  std::swap(record.shape[rank - 1], record.shape[rank - 2]);
  std::swap(record.strides[rank - 1], record.strides[rank - 2]);
  if (IsRowMajor(record)) record.strides.clear();
  return record;
}

absl::StatusOr<Tensor> Checkpoint::Read(absl::string_view name, Form form) const {
  const TensorInfo* info = Find(name);
  if (info == nullptr) return absl::NotFoundError(absl::StrCat(path_, " has no tensor ", Quoted(name)));
  if (form == Form::kTransposed && info->shape.size() < 2) {
    return absl::InvalidArgumentError(
        absl::StrCat(path_, ": tensor ", Quoted(name), " of shape ", ShapeString(info->shape), " has no transpose"));
  }
  const Source& source = SourceOf(*info);
  const TensorRecord wanted = RecordOf(*info, form);
  const bool is_contiguous = wanted.strides.empty() && source.update == nullptr;
  const bool in_blocks = form != Form::kPlain && is_contiguous && wanted.blocks != BlockType::kNone &&
                         !wanted.shape.empty() && wanted.shape.back() % BlockWeights(wanted.blocks) == 0;
  Tensor tensor{info, source.file->bytes().data(), in_blocks ? StoredBytes(wanted) : info->bytes,
                in_blocks ? wanted.blocks : BlockType::kNone};
  const bool is_view = in_blocks ? wanted.exponent == 0
                                 : is_contiguous && IsPlain(wanted) && wanted.offset % ElementSize(info->type) == 0;
  if (tensor.bytes == 0) return tensor;
  if (is_view) {
    const absl::StatusOr<const uint8_t*> view = source.file->View(wanted.offset, tensor.bytes);
    if (!view.ok()) {
      return absl::Status(view.status().code(),
                          absl::StrCat(path_, ": tensor ", Quoted(name), ": ", view.status().message()));
    }
    tensor.data = *view;
    return tensor;
  }
  const std::pair<const TensorInfo*, Form> key(info, form);
  {
    absl::MutexLock lock(&mu_);
    const auto copied = copies_.find(key);
    if (copied != copies_.end()) {
      tensor.data = copied->second.get();
      return tensor;
    }
  }
  // Without the lock, so that several threads copy tensors side by side; of two that copy the same one's is kept.
  std::unique_ptr<uint8_t[]> memory(new uint8_t[tensor.bytes]);  // Not zeroed first.
  const absl::Status status = Copy(*info, wanted, in_blocks, absl::MakeSpan(memory.get(), tensor.bytes));
  if (!status.ok()) {
    return absl::Status(status.code(), absl::StrCat(path_, ": tensor ", Quoted(name), ": ", status.message()));
  }
  absl::MutexLock lock(&mu_);
  tensor.data = copies_.try_emplace(key, std::move(memory)).first->second.get();
  return tensor;
}

void Checkpoint::Forget(absl::string_view name, Form form) const {
  const absl::StatusOr<Tensor> tensor = Read(name, form);
  if (!tensor.ok() || tensor->bytes == 0) return;
  {
    absl::MutexLock lock(&mu_);
    if (copies_.contains({tensor->info, form})) return;
  }
  SourceOf(*tensor->info).file->ForgetView(static_cast<const uint8_t*>(tensor->data), tensor->bytes);
}

absl::Status Checkpoint::Copy(const TensorInfo& info, const TensorRecord& wanted, bool in_blocks,
                              absl::Span<uint8_t> out) const {
  const Source& source = SourceOf(info);
  if (in_blocks) {
    RWKV_RETURN_IF_ERROR(source.file->ReadAt(wanted.offset, out));
    ScaleBlocks(wanted.blocks, wanted.exponent, out);
    return absl::OkStatus();
  }
  // `wanted` has strides that the tensor itself has not if its transpose is wanted.
  if (wanted.shape != info.shape && (!wanted.strides.empty() || source.update != nullptr)) {
    return CopyTransposed(info, out);
  }
  return source.update != nullptr ? MergeBytes(info, 0, out) : ReadTensor(*source.file, wanted, 0, out);
}

// A few rows at a time: what is in memory twice is bounded.
absl::Status Checkpoint::CopyTransposed(const TensorInfo& info, absl::Span<uint8_t> out) const {
  constexpr int64_t kBytesAtOnce = 1 << 18;
  const int64_t size = ElementSize(info.type);
  const int64_t cols = info.shape.back();
  const int64_t rows = info.shape[info.shape.size() - 2];
  const int64_t total = info.bytes / size / cols;  // Rows of the whole stack.
  const int64_t at_once = std::max<int64_t>(1, kBytesAtOnce / (cols * size));
  std::vector<uint8_t> piece;
  for (int64_t first = 0; first < total; first += at_once) {
    const int64_t count = std::min(at_once, total - first);
    piece.resize(count * cols * size);
    RWKV_RETURN_IF_ERROR(ReadBytes(info, first * cols * size, absl::MakeSpan(piece)));
    for (int64_t row = 0, run; row < count; row += run) {
      const int64_t one = (first + row) / rows;  // Of the stack.
      const int64_t begin = (first + row) % rows;
      run = std::min(count - row, rows - begin);
      Transpose(size, piece.data() + row * cols * size, run, cols, rows,
                out.data() + (one * rows * cols + begin) * size);
    }
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::ReadBytes(const TensorInfo& info, int64_t offset, absl::Span<uint8_t> out) const {
  const Source& source = SourceOf(info);
  if (source.update != nullptr) return MergeBytes(info, offset, out);
  return ReadTensor(*source.file, *source.record, offset, out);
}

absl::Status Checkpoint::ReadFloats(const TensorInfo& info, int64_t first, absl::Span<float> out) const {
  constexpr size_t kElementsAtOnce = 1 << 18;
  const Source& source = SourceOf(info);
  const kernels::DType dtype = *WeightDType(info.type);
  const int64_t size = ElementSize(info.type);
  std::vector<uint8_t> bytes;
  while (!out.empty()) {
    const absl::Span<float> part = out.subspan(0, kElementsAtOnce);
    bytes.resize(part.size() * size);
    RWKV_RETURN_IF_ERROR(ReadTensor(*source.file, *source.record, first * size, absl::MakeSpan(bytes)));
    kernels::WidenToFloat(dtype, bytes.data(), static_cast<int64_t>(part.size()), part.data());
    if (source.update != nullptr) {
      RWKV_RETURN_IF_ERROR(adapter_->AddTo(*source.update, info.shape[1], first, part));
    }
    out.remove_prefix(part.size());
    first += static_cast<int64_t>(part.size());
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::MergeBytes(const TensorInfo& info, int64_t offset, absl::Span<uint8_t> out) const {
  constexpr int64_t kElementsAtOnce = 1 << 18;
  const int64_t size = ElementSize(info.type);
  std::vector<float> values;
  while (!out.empty()) {
    const int64_t count = std::min(static_cast<int64_t>(out.size()) / size, kElementsAtOnce);
    values.resize(count);
    RWKV_RETURN_IF_ERROR(ReadFloats(info, offset / size, absl::MakeSpan(values)));
    kernels::NarrowFromFloat(*WeightDType(info.type), values.data(), count, out.data());
    out.remove_prefix(count * size);
    offset += count * size;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::string>> Checkpoint::Vocabulary() const {
  if (container_.tokens.empty()) return absl::NotFoundError(absl::StrCat(path_, " brings no vocabulary"));
  absl::StatusOr<std::vector<std::string>> vocabulary =
      GgufVocabulary(container_.metadata, container_.tokens, container_.token_types);
  if (vocabulary.ok()) return vocabulary;
  return absl::Status(vocabulary.status().code(), absl::StrCat(path_, ": ", vocabulary.status().message()));
}

}  // namespace rwkv::checkpoint
