#include "services/checkpoint/checkpoint.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/formats/safetensors.h"
#include "services/checkpoint/formats/torch_file.h"

namespace rwkv::checkpoint {
namespace {

// What PyTorch's wrappers put before a model's own names.
std::string WithoutTrainerPrefix(absl::string_view name) {
  while (absl::ConsumePrefix(&name, "_forward_module.") || absl::ConsumePrefix(&name, "model.")) {
  }
  return std::string(name);
}

bool StartsWith(absl::Span<const uint8_t> bytes, absl::string_view text) {
  return bytes.size() >= text.size() && std::memcmp(bytes.data(), text.data(), text.size()) == 0;
}

// Whether elements lie in the file as row-major order wants them. The stride of a dimension of one means nothing.
bool IsRowMajor(const TensorRecord& record, int64_t elements) {
  if (record.strides.empty() || elements == 0) return true;
  int64_t expected = 1;
  for (size_t i = record.shape.size(); i-- > 0;) {
    if (record.shape[i] != 1 && record.strides[i] != expected) return false;
    expected *= record.shape[i];
  }
  return true;
}

// Elements [first, first + count) in row-major order of a strided view, to `out`.
void Gather(absl::Span<const uint8_t> file, const TensorRecord& record, int64_t first, int64_t count, uint8_t* out) {
  const int64_t size = ElementSize(record.type);
  const size_t rank = record.shape.size();
  std::vector<int64_t> index(rank);
  for (size_t i = rank; i-- > 0;) {
    index[i] = first % record.shape[i];
    first /= record.shape[i];
  }
  for (int64_t n = 0; n < count; ++n) {
    int64_t element = 0;
    for (size_t i = 0; i < rank; ++i) element += index[i] * record.strides[i];
    std::memcpy(out + n * size, file.data() + record.offset + element * size, static_cast<size_t>(size));
    for (size_t i = rank; i-- > 0;) {
      if (++index[i] < record.shape[i]) break;
      index[i] = 0;
    }
  }
}

}  // namespace

Checkpoint::Checkpoint(std::string path, std::unique_ptr<MappedFile> file)
    : path_(std::move(path)), file_(std::move(file)) {}

Checkpoint::~Checkpoint() = default;

absl::StatusOr<std::shared_ptr<const Checkpoint>> Checkpoint::Open(const std::string& path) {
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<MappedFile> file, MappedFile::Open(path));
  std::shared_ptr<Checkpoint> checkpoint(new Checkpoint(path, std::move(file)));
  if (absl::Status status = checkpoint->ReadDirectory(); !status.ok()) {
    return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
  }
  return checkpoint;
}

absl::Status Checkpoint::ReadDirectory() {
  const absl::Span<const uint8_t> bytes = file_->bytes();
  if (StartsWith(bytes, "GGUF")) return absl::UnimplementedError("a GGUF file; this build reads .safetensors and .pth");
  if (StartsWith(bytes, "fmgg")) {
    return absl::UnimplementedError("an rwkv.cpp file; this build reads .safetensors and .pth");
  }
  if (LooksLikeTorchZip(bytes)) {
    format_ = "pth";
    RWKV_ASSIGN_OR_RETURN(std::vector<TensorRecord> records, ReadTorchZip(bytes));
    return AddRecords(std::move(records));
  }
  if (LooksLikeTorchLegacy(bytes)) {
    format_ = "pth-legacy";
    RWKV_ASSIGN_OR_RETURN(std::vector<TensorRecord> records, ReadTorchLegacy(bytes));
    return AddRecords(std::move(records));
  }
  format_ = "safetensors";
  RWKV_ASSIGN_OR_RETURN(SafetensorsDirectory directory, ReadSafetensors(bytes));
  metadata_ = std::move(directory.metadata);
  return AddRecords(std::move(directory.tensors));
}

absl::Status Checkpoint::AddRecords(std::vector<TensorRecord> records) {
  for (TensorRecord& record : records) record.name = WithoutTrainerPrefix(record.name);
  std::sort(records.begin(), records.end(),
            [](const TensorRecord& a, const TensorRecord& b) { return a.name < b.name; });
  int64_t total = 0;
  for (size_t i = 0; i < records.size(); ++i) {
    TensorRecord& record = records[i];
    if (i > 0 && record.name == records[i - 1].name) {
      return absl::InvalidArgumentError(absl::StrCat("two tensors are named ", Quoted(record.name)));
    }
    // The readers have checked that shapes fit their data.
    TensorInfo info{record.name, record.type, record.shape, *ByteCount(record.shape, record.type)};
    if (IsRowMajor(record, info.bytes / ElementSize(info.type))) record.strides.clear();
    if (__builtin_add_overflow(total, info.bytes, &total) || total / 2 > file_bytes()) {
      return absl::InvalidArgumentError(absl::StrCat("its tensors claim more than twice the file's ", file_bytes(),
                                                     " bytes, by sharing them (up to ", Quoted(record.name), ")"));
    }
    infos_.push_back(std::move(info));
  }
  records_ = std::move(records);
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
  const TensorRecord& record = RecordOf(*info);
  if (info->bytes == 0 || (record.strides.empty() && record.offset % ElementSize(info->type) == 0)) {
    return Tensor{info, file_->bytes().data() + (info->bytes == 0 ? 0 : record.offset)};
  }
  absl::MutexLock lock(&mu_);
  std::unique_ptr<uint8_t[]>& copy = copies_[info];
  if (copy == nullptr) {
    copy = std::make_unique<uint8_t[]>(info->bytes);
    if (record.strides.empty()) {
      std::memcpy(copy.get(), file_->bytes().data() + record.offset, info->bytes);
    } else {
      Gather(file_->bytes(), record, 0, info->bytes / ElementSize(info->type), copy.get());
    }
  }
  return Tensor{info, copy.get()};
}

absl::Status Checkpoint::ReadBytes(const TensorInfo& info, int64_t offset, absl::Span<uint8_t> out) const {
  if (out.empty()) return absl::OkStatus();
  const TensorRecord& record = RecordOf(info);
  const int64_t size = ElementSize(info.type);
  if (record.strides.empty()) return file_->ReadAt(record.offset + offset, out);
  Gather(file_->bytes(), record, offset / size, static_cast<int64_t>(out.size()) / size, out.data());
  return absl::OkStatus();
}

}  // namespace rwkv::checkpoint
