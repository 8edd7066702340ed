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
  if (absl::StrContains(name, "init_lora_")) return "PiSSA";
  if (absl::StrContains(name, ".disha")) return "DiSHA";
  if (absl::StrContains(name, ".bone")) return "Bone";
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

Adapter::Adapter(std::string path, std::unique_ptr<MappedFile> file, double alpha)
    : path_(std::move(path)), file_(std::move(file)), alpha_(alpha) {}

absl::StatusOr<std::unique_ptr<const Adapter>> Adapter::Open(const std::string& path, double alpha) {
  if (!(alpha > 0) || !std::isfinite(alpha)) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": alpha is ", alpha, "; it must be the positive number that the adapter was trained with"));
  }
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<MappedFile> file, MappedFile::Open(path));
  std::unique_ptr<Adapter> adapter(new Adapter(path, std::move(file), alpha));
  if (absl::Status status = adapter->ReadDirectory(); !status.ok()) {
    return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
  }
  return std::unique_ptr<const Adapter>(std::move(adapter));
}

absl::Status Adapter::ReadDirectory() {
  RWKV_ASSIGN_OR_RETURN(Container container, ReadContainer(file_->bytes()));
  std::map<std::string, Update> updates;
  for (TensorRecord& record : container.records) {
    if (const absl::string_view kind = OtherKind(record.name); !kind.empty()) {
      return absl::UnimplementedError(
          absl::StrCat("tensor ", Quoted(record.name), " belongs to a ", kind, " adapter; only LoRA is merged"));
    }
    if (!WeightDType(record.type).has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", Quoted(record.name), " is ", ElementTypeName(record.type)));
    }
    const std::string name = record.name;
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
  if (updates.empty()) return absl::InvalidArgumentError("is no LoRA adapter: it has no X.lora_A and X.lora_B");
  for (auto& [name, update] : updates) {
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

absl::Status Adapter::AddTo(const Update& update, int64_t first, absl::Span<float> values) const {
  const int64_t columns = update.a.shape[1];
  const int64_t count = static_cast<int64_t>(values.size());
  if (count == 0) return absl::OkStatus();
  const int64_t first_row = first / columns;
  const int64_t rows = (first + count - 1) / columns - first_row + 1;
  std::vector<float> a;
  std::vector<float> b;
  RWKV_RETURN_IF_ERROR(ReadFloats(*file_, update.a, 0, update.rank * columns, &a));
  RWKV_RETURN_IF_ERROR(ReadFloats(*file_, update.b, first_row * update.rank, rows * update.rank, &b));
  const float scale = static_cast<float>(alpha_ / static_cast<double>(update.rank));
  std::vector<float> delta(columns);
  for (int64_t row = 0; row < rows; ++row) {
    std::fill(delta.begin(), delta.end(), 0.0f);
    for (int64_t k = 0; k < update.rank; ++k) {
      const float factor = b[row * update.rank + k];
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
