#include "services/checkpoint/checkpoint.h"

#include <algorithm>
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

std::vector<int64_t> WithoutUnits(std::vector<int64_t> shape) {
  shape.erase(std::remove(shape.begin(), shape.end(), 1), shape.end());
  return shape;
}

}  // namespace

Checkpoint::Checkpoint(std::string path, std::unique_ptr<MappedFile> file, std::unique_ptr<const Adapter> adapter)
    : path_(std::move(path)), file_(std::move(file)), adapter_(std::move(adapter)) {}

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
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<MappedFile> file, MappedFile::Open(path));
  std::shared_ptr<Checkpoint> checkpoint(new Checkpoint(path, std::move(file), std::move(adapter)));
  if (absl::Status status = checkpoint->ReadDirectory(); !status.ok()) {
    return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
  }
  if (checkpoint->adapter_ == nullptr) return checkpoint;
  if (absl::Status status = checkpoint->AddAdapter(); !status.ok()) {
    return absl::Status(status.code(), absl::StrCat(checkpoint->adapter_->path(), ": ", status.message()));
  }
  return checkpoint;
}

absl::Status Checkpoint::ReadDirectory() {
  RWKV_ASSIGN_OR_RETURN(container_, ReadContainer(file_->bytes()));
  for (TensorRecord& record : container_.records) {
    if (IsRowMajor(record)) record.strides.clear();
    RWKV_RETURN_IF_ERROR(AddTensor(record, *file_));
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

absl::StatusOr<Tensor> Checkpoint::Read(absl::string_view name) const {
  const TensorInfo* info = Find(name);
  if (info == nullptr) return absl::NotFoundError(absl::StrCat(path_, " has no tensor ", Quoted(name)));
  const Source& source = SourceOf(*info);
  const bool is_view = IsPlain(*source.record) && source.update == nullptr && source.record->strides.empty() &&
                       source.record->offset % ElementSize(info->type) == 0;
  if (info->bytes == 0 || is_view) {
    return Tensor{info, source.file->bytes().data() + (info->bytes == 0 ? 0 : source.record->offset)};
  }
  absl::MutexLock lock(&mu_);
  std::unique_ptr<uint8_t[]>& copy = copies_[info];
  if (copy == nullptr) {
    auto memory = std::make_unique<uint8_t[]>(info->bytes);
    if (absl::Status status = ReadBytes(*info, 0, absl::MakeSpan(memory.get(), info->bytes)); !status.ok()) {
      return absl::Status(status.code(), absl::StrCat(path_, ": tensor ", Quoted(name), ": ", status.message()));
    }
    copy = std::move(memory);
  }
  return Tensor{info, copy.get()};
}

absl::Status Checkpoint::ReadBytes(const TensorInfo& info, int64_t offset, absl::Span<uint8_t> out) const {
  const Source& source = SourceOf(info);
  if (source.update != nullptr) return MergeBytes(info, offset, out);
  return ReadTensor(*source.file, *source.record, offset, out);
}

absl::Status Checkpoint::MergeBytes(const TensorInfo& info, int64_t offset, absl::Span<uint8_t> out) const {
  constexpr int64_t kElementsAtOnce = 1 << 20;
  const Source& source = SourceOf(info);
  const kernels::DType dtype = *WeightDType(info.type);
  const int64_t size = ElementSize(info.type);
  std::vector<float> values;
  while (!out.empty()) {
    const int64_t count = std::min(static_cast<int64_t>(out.size()) / size, kElementsAtOnce);
    const absl::Span<uint8_t> part = out.subspan(0, count * size);
    RWKV_RETURN_IF_ERROR(ReadTensor(*source.file, *source.record, offset, part));
    values.resize(count);
    kernels::WidenToFloat(dtype, part.data(), count, values.data());
    RWKV_RETURN_IF_ERROR(adapter_->AddTo(*source.update, info.shape[1], offset / size, absl::MakeSpan(values)));
    kernels::NarrowFromFloat(dtype, values.data(), count, part.data());
    out.remove_prefix(part.size());
    offset += static_cast<int64_t>(part.size());
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
