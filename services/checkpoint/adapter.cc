#include "services/checkpoint/adapter.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/types/optional.h"
#include "kernels/base/dtype.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/container.h"
#include "services/checkpoint/dialects/views.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/formats/tensor_reader.h"

namespace rwkv::checkpoint {
namespace {

// Names that tell an adapter of another kind. Source: JL-er/RWKV-PEFT, rwkvt/peft.
absl::string_view OtherKind(absl::string_view name) {
  if (absl::StrContains(name, ".bone_")) return "PEFT Bone";
  if (absl::StrContains(name, ".lora_magnitude") || absl::StrContains(name, ".lora_M")) return "DoRA";
  return "";
}

struct Factor {
  absl::string_view matrix;  // "blocks.0.att.key"; empty: the name is of no factor.
  bool is_a = false;
  bool is_transposed = false;
};

// X.lora_A and X.lora_B, with ".weight" or PEFT's ".default.weight" behind; X.lora.0, which is transposed, and X.lora.1
// of web-rwkv's assets/scripts/convert_safetensors.py.
Factor ParseFactor(absl::string_view name) {
  if (absl::ConsumeSuffix(&name, ".lora.0")) return {name, true, true};
  if (absl::ConsumeSuffix(&name, ".lora.1")) return {name, false, false};
  absl::ConsumeSuffix(&name, ".weight");
  absl::ConsumeSuffix(&name, ".default");
  if (absl::ConsumeSuffix(&name, ".lora_A")) return {name, true, false};
  if (absl::ConsumeSuffix(&name, ".lora_B")) return {name, false, false};
  return {};
}

// Empty if there is none of that name.
TensorRecord FindRecord(const Container& container, const std::string& name) {
  const auto found =
      std::lower_bound(container.records.begin(), container.records.end(), name,
                       [](const TensorRecord& record, const std::string& key) { return record.name < key; });
  return found != container.records.end() && found->name == name ? *found : TensorRecord();
}

// Elements [first, first + count) of a tensor as floats.
absl::Status ReadFloats(const MappedFile& file, const TensorRecord& record, int64_t first, int64_t count,
                        std::vector<float>* out) {
  const int64_t size = ElementSize(record.type);
  std::vector<uint8_t> bytes(count * size);
  RWKV_RETURN_IF_ERROR(ReadTensor(file, record, first * size, absl::MakeSpan(bytes)));
  out->resize(count);
  kernels::WidenToFloat(*WeightDType(record.type), bytes.data(), count, out->data());
  return absl::OkStatus();
}

}  // namespace

bool Adapter::Update::Fits(absl::Span<const int64_t> shape) const {
  if (shape.size() != 2) return false;
  if (!disha.name.empty()) return shape[0] == disha.shape[1];
  return shape[0] == b.shape[0] && shape[1] == a.shape[1];
}

Adapter::Adapter(const AdapterOptions& options, std::unique_ptr<MappedFile> file, std::unique_ptr<MappedFile> initial)
    : path_(options.path), file_(std::move(file)), initial_(std::move(initial)), alpha_(options.alpha) {}

absl::StatusOr<std::unique_ptr<const Adapter>> Adapter::Open(const AdapterOptions& options) {
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<MappedFile> file, OpenFile(options.path));
  std::unique_ptr<MappedFile> initial;
  if (!options.initial.empty()) {
    RWKV_ASSIGN_OR_RETURN(initial, OpenFile(options.initial));
  }
  std::unique_ptr<Adapter> adapter(new Adapter(options, std::move(file), std::move(initial)));
  if (absl::Status status = adapter->ReadDirectory(); !status.ok()) {
    return absl::Status(status.code(), absl::StrCat(options.path, ": ", status.message()));
  }
  if (absl::Status status = adapter->ReadInitial(); !status.ok()) {
    return absl::Status(status.code(), absl::StrCat(options.initial, ": ", status.message()));
  }
  if (absl::Status status = adapter->CheckAlpha(); !status.ok()) {
    return absl::Status(status.code(), absl::StrCat(options.path, ": ", status.message()));
  }
  return std::unique_ptr<const Adapter>(std::move(adapter));
}

// With every update's initial factors, which have the shapes of the trained ones.
absl::Status Adapter::ReadInitial() {
  if (initial_ == nullptr) return absl::OkStatus();
  RWKV_ASSIGN_OR_RETURN(Container container, ReadContainer(initial_->bytes()));
  for (Update& update : updates_) {
    const absl::string_view matrix = absl::StripSuffix(update.name, ".weight");
    update.initial_a = FindRecord(container, absl::StrCat(matrix, ".init_lora_A"));
    update.initial_b = FindRecord(container, absl::StrCat(matrix, ".init_lora_B"));
    if (update.initial_a.shape != update.a.shape || update.initial_b.shape != update.b.shape ||
        !WeightDType(update.initial_a.type).has_value() || !WeightDType(update.initial_b.type).has_value() ||
        !update.disha.name.empty()) {
      return absl::InvalidArgumentError(absl::StrCat("has no initial factors ", Quoted(matrix), ".init_lora_A and ",
                                                     "init_lora_B of the shapes of ", Quoted(update.factor_name())));
    }
  }
  return absl::OkStatus();
}

absl::Status Adapter::CheckAlpha() const {
  const bool needs_alpha = std::any_of(updates_.begin(), updates_.end(), [this](const Update& update) {
    return update.disha.name.empty() && initial_ == nullptr;
  });
  if (!needs_alpha && alpha_.has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat("alpha is ", *alpha_, ", but a ", initial_ == nullptr ? "DiSHA" : "PiSSA", " adapter has none"));
  }
  if (needs_alpha && !(alpha_.has_value() && *alpha_ > 0 && std::isfinite(*alpha_))) {
    return absl::InvalidArgumentError(
        absl::StrCat("alpha is ", alpha_.has_value() ? absl::StrCat(*alpha_) : "not given",
                     "; it must be the positive number that the adapter was trained with"));
  }
  return absl::OkStatus();
}

absl::Status Adapter::ReadDirectory() {
  RWKV_ASSIGN_OR_RETURN(Container container, ReadContainer(file_->bytes()));
  std::map<std::string, Update> updates;
  for (TensorRecord& record : container.records) {
    if (const absl::string_view kind = OtherKind(record.name); !kind.empty()) {
      return absl::UnimplementedError(absl::StrCat("tensor ", Quoted(record.name), " belongs to a ", kind,
                                                   " adapter; merged are LoRA, PiSSA and DiSHA"));
    }
    if (!WeightDType(record.type).has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", Quoted(record.name), " is ", ElementTypeName(record.type)));
    }
    const std::string name = record.name;
    absl::string_view matrix = name;
    if (absl::ConsumeSuffix(&matrix, ".disha") || absl::ConsumeSuffix(&matrix, ".bone")) {
      if (record.shape.size() != 2 || record.shape[0] == 0) {
        return absl::UnimplementedError(absl::StrCat("tensor ", Quoted(name), " has shape ", ShapeString(record.shape),
                                                     "; of DiSHA only [rank, out] is merged (mode bone)"));
      }
      Update& update = updates[absl::StrCat(matrix, ".weight")];
      update.disha = std::move(record);
      continue;
    }
    const Factor parsed = ParseFactor(name);
    if (parsed.matrix.empty()) {
      replacements_.push_back(std::move(record));
      continue;
    }
    if (parsed.is_transposed) RWKV_RETURN_IF_ERROR(Transpose(0, 1, &record));
    Update& update = updates[absl::StrCat(parsed.matrix, ".weight")];
    TensorRecord& factor = parsed.is_a ? update.a : update.b;
    if (!factor.name.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensors ", Quoted(factor.name), " and ", Quoted(name), " are the same factor"));
    }
    factor = std::move(record);
  }
  if (updates.empty())
    return absl::InvalidArgumentError("is no LoRA adapter: it has no X.lora_A and X.lora_B (nor X.disha)");
  for (auto& [name, update] : updates) {
    if (!update.disha.name.empty() && update.a.name.empty() && update.b.name.empty()) {
      update.name = name;
      update.rank = update.disha.shape[0];
      updates_.push_back(std::move(update));
      continue;
    }
    if (!update.disha.name.empty()) {
      return absl::InvalidArgumentError(absl::StrCat("tensors ", Quoted(update.disha.name), " and ",
                                                     Quoted(update.a.name + update.b.name), " change the same matrix"));
    }
    if (update.a.name.empty() || update.b.name.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", Quoted(update.a.name + update.b.name), " has no other half, lora_A or lora_B"));
    }
    if (update.a.shape.size() != 2 || update.b.shape.size() != 2 || update.a.shape[0] != update.b.shape[1] ||
        update.a.shape[0] == 0) {
      return absl::InvalidArgumentError(absl::StrCat(
          "tensors ", Quoted(update.a.name), " of shape ", ShapeString(update.a.shape), " and ", Quoted(update.b.name),
          " of shape ", ShapeString(update.b.shape), " are not [rank, in] and [out, rank]"));
    }
    update.name = name;
    update.rank = update.a.shape[0];
    updates_.push_back(std::move(update));
  }
  return absl::OkStatus();
}

absl::Status Adapter::AddTo(const Update& update, int64_t columns, int64_t first, absl::Span<float> values) const {
  if (values.empty()) return absl::OkStatus();
  if (!update.disha.name.empty()) {
    std::vector<float> disha;
    const int64_t rows = update.disha.shape[1];
    RWKV_RETURN_IF_ERROR(ReadFloats(*file_, update.disha, 0, update.rank * rows, &disha));
    for (size_t n = 0; n < values.size(); ++n) {
      const int64_t at = first + static_cast<int64_t>(n);
      values[n] += disha[at % columns % update.rank * rows + at / columns];
    }
    return absl::OkStatus();
  }
  if (initial_ == nullptr) {
    const float scale = static_cast<float>(*alpha_ / static_cast<double>(update.rank));
    return AddProduct(*file_, update.a, update.b, scale, first, values);
  }
  RWKV_RETURN_IF_ERROR(AddProduct(*initial_, update.initial_a, update.initial_b, -1, first, values));
  return AddProduct(*file_, update.a, update.b, 1, first, values);
}

absl::Status Adapter::AddProduct(const MappedFile& file, const TensorRecord& a_record, const TensorRecord& b_record,
                                 float scale, int64_t first, absl::Span<float> values) const {
  const int64_t columns = a_record.shape[1];
  const int64_t rank = a_record.shape[0];
  const int64_t count = static_cast<int64_t>(values.size());
  const int64_t first_row = first / columns;
  const int64_t rows = (first + count - 1) / columns - first_row + 1;
  std::vector<float> a;
  std::vector<float> b;
  RWKV_RETURN_IF_ERROR(ReadFloats(file, a_record, 0, rank * columns, &a));
  RWKV_RETURN_IF_ERROR(ReadFloats(file, b_record, first_row * rank, rows * rank, &b));
  std::vector<float> delta(columns);
  for (int64_t row = 0; row < rows; ++row) {
    std::fill(delta.begin(), delta.end(), 0.0f);
    for (int64_t k = 0; k < rank; ++k) {
      const float factor = b[row * rank + k];
      const float* source = &a[k * columns];
      for (int64_t column = 0; column < columns; ++column) delta[column] += factor * source[column];
    }
    const int64_t row_start = (first_row + row) * columns;  // Its first element's number.
    const int64_t begin = std::max(first, row_start);
    const int64_t end = std::min(first + count, row_start + columns);
    for (int64_t i = begin; i < end; ++i) values[i - first] += delta[i - row_start] * scale;
  }
  return absl::OkStatus();
}

}  // namespace rwkv::checkpoint
