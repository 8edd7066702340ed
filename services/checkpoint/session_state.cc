#include "services/checkpoint/session_state.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/dtype.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/formats/tensor_reader.h"
#include "services/checkpoint/formats/tensor_record.h"
#include "xxhash.h"

namespace rwkv::checkpoint {
namespace {

constexpr char kTunedName[] = "att.time_state";
constexpr char kMatrixName[] = "att.state";
// Headers and padding of any container, for each tensor.
constexpr int64_t kMaxDirectoryBytes = 1024;
constexpr int64_t kMaxOtherBytes = 64 << 10;

std::string TensorName(int layer, absl::string_view name) { return absl::StrCat("blocks.", layer, ".", name); }

// A value of the file's, for messages.
absl::StatusOr<std::string> Metadata(const Container& container, const std::string& key) {
  const auto found = container.metadata.find(key);
  if (found != container.metadata.end()) return found->second;
  return absl::InvalidArgumentError(absl::StrCat("its metadata has no ", key));
}

int64_t Elements(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

}  // namespace

std::string SessionStateChecksum(absl::Span<const absl::string_view> pieces) {
  const std::unique_ptr<XXH3_state_t, void (*)(XXH3_state_t*)> state(
      XXH3_createState(), [](XXH3_state_t* state) { XXH3_freeState(state); });
  XXH3_64bits_reset(state.get());
  for (const absl::string_view piece : pieces) XXH3_64bits_update(state.get(), piece.data(), piece.size());
  return absl::StrFormat("%016x", XXH3_64bits_digest(state.get()));
}

int64_t StateModel::RecordBytes() const {
  int64_t bytes = 0;
  for (const Tensor& tensor : layout) bytes += Elements(tensor.shape) * static_cast<int64_t>(sizeof(float));
  return bytes;
}

int64_t StateModel::MaxFileBytes() const {
  return layer_count * (RecordBytes() + static_cast<int64_t>(layout.size()) * kMaxDirectoryBytes) +
         kMaxSessionTokens * static_cast<int64_t>(sizeof(int32_t)) + kMaxOtherBytes;
}

absl::StatusOr<std::unique_ptr<const SessionState>> SessionState::Open(std::unique_ptr<const MappedFile> file,
                                                                       StateModel model) {
  std::unique_ptr<SessionState> state(new SessionState(std::move(file), std::move(model)));
  RWKV_RETURN_IF_ERROR(state->Check());
  return std::unique_ptr<const SessionState>(std::move(state));
}

const TensorRecord* SessionState::Find(absl::string_view name) const {
  const std::vector<TensorRecord>& records = container_.records;
  const auto found =
      std::lower_bound(records.begin(), records.end(), name,
                       [](const TensorRecord& record, absl::string_view key) { return record.name < key; });
  return found != records.end() && found->name == name ? &*found : nullptr;
}

std::string SessionState::SourceName(int layer, const StateModel::Tensor& tensor) const {
  if (!is_tuned_) return TensorName(layer, tensor.name);
  return tensor.name == kMatrixName ? TensorName(layer, kTunedName) : "";
}

absl::Status SessionState::Check() {
  absl::StatusOr<Container> container = ReadContainer(file_->bytes());
  if (!container.ok()) {
    return absl::Status(container.status().code(), absl::StrCat("no state file: ", container.status().message()));
  }
  container_ = *std::move(container);
  if (container_.format != "safetensors" && container_.format != "pth" && container_.format != "pth-legacy") {
    return absl::InvalidArgumentError(
        absl::StrCat("a file of ", container_.format, "; states are .safetensors, tuned ones .pth, too"));
  }
  is_tuned_ = std::any_of(container_.records.begin(), container_.records.end(), [](const TensorRecord& record) {
    return absl::EndsWith(record.name, absl::StrCat(".", kTunedName));
  });
  const absl::Status fits = CheckTensors();
  // Where the model is another, that is why; what else differs tells which.
  const auto fingerprint = container_.metadata.find("model_fingerprint");
  if (fingerprint != container_.metadata.end() && fingerprint->second != model_.fingerprint) {
    return absl::FailedPreconditionError(absl::StrCat("it is a state of the model with fingerprint ",
                                                      Quoted(fingerprint->second), "; the one that is served has ",
                                                      model_.fingerprint, fits.ok() ? "" : ": ", fits.message()));
  }
  RWKV_RETURN_IF_ERROR(fits);
  RWKV_RETURN_IF_ERROR(CheckMetadata());
  RWKV_RETURN_IF_ERROR(ReadTokens());
  return CheckFinite();
}

absl::Status SessionState::CheckTensors() const {
  size_t expected = 0;
  for (int layer = 0; layer < model_.layer_count; ++layer) {
    for (const StateModel::Tensor& tensor : model_.layout) {
      const std::string name = SourceName(layer, tensor);
      if (name.empty()) continue;
      ++expected;
      const TensorRecord* const record = Find(name);
      if (record == nullptr) return absl::InvalidArgumentError(absl::StrCat("there is no tensor ", name));
      if (record->shape != tensor.shape) {
        return absl::FailedPreconditionError(absl::StrCat(name, " has shape ", ShapeString(record->shape),
                                                          "; the model's states have ", ShapeString(tensor.shape)));
      }
      const bool readable = is_tuned_ ? WeightDType(record->type).has_value() : record->type == ElementType::kFloat32;
      if (!readable || record->is_stored_double) {
        return absl::InvalidArgumentError(
            absl::StrCat(name, " is ", record->is_stored_double ? "fp64" : ElementTypeName(record->type),
                         "; it has to be ", is_tuned_ ? "fp32, bf16 or fp16" : "fp32"));
      }
    }
  }
  if (expected == 0) {
    return absl::FailedPreconditionError("this model has no matrix states, so no tuned one fits it");
  }
  if (!is_tuned_ && Find(kSessionTokensTensor) != nullptr) ++expected;
  if (container_.records.size() == expected) return absl::OkStatus();
  for (const TensorRecord& record : container_.records) {
    if (!is_tuned_ && record.name == kSessionTokensTensor) continue;
    bool known = false;
    for (int layer = 0; layer < model_.layer_count && !known; ++layer) {
      if (!absl::StartsWith(record.name, TensorName(layer, ""))) continue;
      known = std::any_of(model_.layout.begin(), model_.layout.end(),
                          [&](const StateModel::Tensor& tensor) { return record.name == SourceName(layer, tensor); });
    }
    if (known) continue;
    return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(record.name), " is no part of ",
                                                   is_tuned_ ? "a tuned state" : "a state", " of a model of ",
                                                   model_.layer_count, " layers"));
  }
  return absl::OkStatus();
}

absl::Status SessionState::CheckMetadata() {
  const auto checksum = container_.metadata.find("xxh3");
  if (checksum != container_.metadata.end()) {
    uint64_t header = 0;  // The reader has found it to be there and to fit.
    std::memcpy(&header, file_->bytes().data(), sizeof(header));
    const absl::Span<const uint8_t> payload = file_->bytes().subspan(sizeof(header) + header);
    const std::string found =
        SessionStateChecksum({absl::string_view(reinterpret_cast<const char*>(payload.data()), payload.size())});
    if (found != checksum->second) {
      return absl::DataLossError(
          absl::StrCat("its content has the checksum ", found, "; its metadata says ", Quoted(checksum->second)));
    }
  }
  if (is_tuned_) return absl::OkStatus();
  RWKV_RETURN_IF_ERROR(Metadata(container_, "model_fingerprint").status());
  RWKV_ASSIGN_OR_RETURN(const std::string position, Metadata(container_, "position"));
  if (!absl::SimpleAtoi(position, &position_) || position_ > kMaxSessionPosition) {
    return absl::InvalidArgumentError(
        absl::StrCat("its position, ", Quoted(position), ", is no number from 0 to ", kMaxSessionPosition));
  }
  const auto initial_state = container_.metadata.find("initial_state");
  if (initial_state == container_.metadata.end()) return absl::OkStatus();
  initial_state_ = initial_state->second;
  if (initial_state_.size() <= kMaxSessionInitialStateBytes) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("its initial_state has ", initial_state_.size(), " bytes; at most ", kMaxSessionInitialStateBytes));
}

absl::Status SessionState::ReadTokens() {
  const TensorRecord* const record = is_tuned_ ? nullptr : Find(kSessionTokensTensor);
  if (record == nullptr) return absl::OkStatus();
  if (record->type != ElementType::kInt32 || record->shape.size() != 1) {
    return absl::InvalidArgumentError(absl::StrCat(kSessionTokensTensor, " is ", ElementTypeName(record->type), " ",
                                                   ShapeString(record->shape), "; it has to be int32 [position]"));
  }
  const int64_t count = record->shape[0];
  if (count > kMaxSessionTokens || static_cast<uint64_t>(count) != position_) {
    return absl::InvalidArgumentError(absl::StrCat(kSessionTokensTensor, " has ", count, " tokens; the position is ",
                                                   position_, ", and at most ", kMaxSessionTokens, " can be there"));
  }
  token_ids_.resize(count);
  RWKV_RETURN_IF_ERROR(ReadTensor(
      *file_, *record, 0, absl::MakeSpan(reinterpret_cast<uint8_t*>(token_ids_.data()), count * sizeof(uint32_t))));
  for (int64_t i = 0; i < count; ++i) {
    if (token_ids_[i] < static_cast<uint64_t>(model_.vocab_size)) continue;
    return absl::InvalidArgumentError(absl::StrCat("token ", i, " is ", static_cast<int32_t>(token_ids_[i]),
                                                   "; the model has ids below ", model_.vocab_size));
  }
  return absl::OkStatus();
}

absl::Status SessionState::CheckFinite() const {
  for (int layer = 0; layer < model_.layer_count; ++layer) {
    RWKV_ASSIGN_OR_RETURN(const std::string record, Record(layer));
    const char* next = record.data();
    for (const StateModel::Tensor& tensor : model_.layout) {
      const int64_t count = Elements(tensor.shape);
      for (int64_t i = 0; i < count; ++i, next += sizeof(float)) {
        float value;
        std::memcpy(&value, next, sizeof(value));
        if (std::isfinite(value)) continue;
        return absl::InvalidArgumentError(
            absl::StrCat("element ", i, " of ", SourceName(layer, tensor), " is ", value, ", not a finite number"));
      }
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> SessionState::Record(int layer) const {
  std::string bytes(model_.RecordBytes(), '\0');
  char* next = bytes.data();
  std::vector<uint8_t> narrow;
  for (const StateModel::Tensor& tensor : model_.layout) {
    const int64_t count = Elements(tensor.shape);
    const std::string name = SourceName(layer, tensor);
    if (!name.empty()) {
      const TensorRecord& record = *Find(name);
      narrow.resize(count * ElementSize(record.type));
      RWKV_RETURN_IF_ERROR(ReadTensor(*file_, record, 0, absl::MakeSpan(narrow)));
      std::vector<float> wide(count);
      kernels::WidenToFloat(*WeightDType(record.type), narrow.data(), count, wide.data());
      std::memcpy(next, wide.data(), count * sizeof(float));
    }
    next += count * sizeof(float);
  }
  return bytes;
}

}  // namespace rwkv::checkpoint
