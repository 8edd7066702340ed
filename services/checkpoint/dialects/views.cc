#include "services/checkpoint/dialects/views.h"

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "kernels/base/ggml_blocks.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/matrix_names.h"

namespace rwkv::checkpoint {
namespace {

absl::Status Unfit(const TensorRecord& record, absl::string_view wanted) {
  return absl::InvalidArgumentError(
      absl::StrCat("tensor ", Quoted(record.name), " has shape ", ShapeString(record.shape), ", not ", wanted));
}

// Those of an empty tensor mean nothing and may be of any size.
void NeedStrides(TensorRecord* record) {
  if (!record->strides.empty() && ElementCount(record->shape) != 0) return;
  record->strides.assign(record->shape.size(), 1);
  for (size_t i = record->shape.size(); i-- > 1;) {
    record->strides[i - 1] = record->strides[i] * std::max<int64_t>(1, record->shape[i]);
  }
}

TensorRecord Part(const TensorRecord& record, BlockPart part, absl::string_view suffix) {
  TensorRecord out = record;
  absl::StrAppend(&out.name, suffix);
  out.part = part;
  int64_t& columns = out.shape.back();
  if (part == BlockPart::kQuants) {
    out.type = HasMinimums(record.blocks) ? ElementType::kUint8 : ElementType::kInt8;
    out.exponent = 0;  // The scales carry it.
    if (HasMinimums(record.blocks)) columns /= 2;
  } else {
    out.type = ElementType::kFloat16;
    columns /= BlockWeights(record.blocks);
  }
  return out;
}

}  // namespace

absl::optional<LayerName> ParseLayerName(absl::string_view name, absl::string_view prefix) {
  if (!absl::ConsumePrefix(&name, prefix)) return absl::nullopt;
  const size_t dot = name.find('.');
  if (dot == absl::string_view::npos) return absl::nullopt;
  const absl::string_view digits = name.substr(0, dot);
  LayerName out{0, name.substr(dot + 1)};
  if (digits.empty() || digits.size() > 6 || (digits[0] == '0' && digits.size() > 1) ||
      !std::all_of(digits.begin(), digits.end(), absl::ascii_isdigit) || !absl::SimpleAtoi(digits, &out.layer)) {
    return absl::nullopt;
  }
  return out;
}

std::string BlockName(int layer, absl::string_view rest) { return absl::StrCat("blocks.", layer, ".", rest); }

bool AnyNameEndsWith(absl::Span<const TensorRecord> records, absl::string_view suffix) {
  return std::any_of(records.begin(), records.end(),
                     [suffix](const TensorRecord& record) { return absl::EndsWith(record.name, suffix); });
}

absl::Status Transpose(size_t a, size_t b, TensorRecord* record) {
  if (std::max(a, b) >= record->shape.size()) {
    return Unfit(*record, absl::StrCat("one of ", std::max(a, b) + 1, " dimensions or more"));
  }
  NeedStrides(record);
  std::swap(record->shape[a], record->shape[b]);
  std::swap(record->strides[a], record->strides[b]);
  return absl::OkStatus();
}

absl::Status SplitDimension(size_t axis, int64_t n, TensorRecord* record) {
  if (axis >= record->shape.size() || record->shape[axis] % n != 0) {
    return Unfit(*record, absl::StrCat("one whose dimension ", axis, " is a multiple of ", n));
  }
  NeedStrides(record);
  const int64_t size = record->shape[axis] / n;
  const int64_t stride = record->strides[axis];
  record->shape[axis] = size;
  record->shape.insert(record->shape.begin() + axis, n);
  record->strides.insert(record->strides.begin() + axis, stride * size);
  return absl::OkStatus();
}

absl::Status Reorder(size_t axis, absl::Span<const int> order, TensorRecord* record) {
  const int64_t pieces = static_cast<int64_t>(order.size());
  if (axis >= record->shape.size() || record->shape[axis] % pieces != 0) {
    return Unfit(*record, absl::StrCat("one whose dimension ", axis, " is a multiple of ", pieces));
  }
  NeedStrides(record);
  record->reordered = axis;
  record->order.assign(order.begin(), order.end());
  return absl::OkStatus();
}

absl::Status Reshape(std::vector<int64_t> shape, TensorRecord* record) {
  if (!IsRowMajor(*record) || ElementCount(shape) != ElementCount(record->shape)) {
    return Unfit(*record, absl::StrCat("the elements of ", ShapeString(shape), " in order"));
  }
  record->shape = std::move(shape);
  record->strides.clear();
  return absl::OkStatus();
}

absl::Status Squeeze(TensorRecord* record) {
  std::vector<int64_t> shape = record->shape;
  shape.erase(std::remove(shape.begin(), shape.end(), 1), shape.end());
  if (shape.empty()) shape.push_back(1);
  return Reshape(std::move(shape), record);
}

absl::StatusOr<std::vector<TensorRecord>> SplitFused(const TensorRecord& fused, absl::Span<const std::string> names) {
  const int64_t pieces = static_cast<int64_t>(names.size());
  const int64_t elements = ElementCount(fused.shape).value_or(0);
  if (fused.shape.empty() || fused.shape[0] != pieces || fused.shape.back() != elements / pieces ||
      !IsRowMajor(fused) || fused.blocks != BlockType::kNone) {
    return Unfit(fused, absl::StrCat("[", pieces, ", 1, width] in order"));
  }
  std::vector<TensorRecord> out;
  for (int64_t i = 0; i < pieces; ++i) {
    TensorRecord piece = fused;
    piece.name = names[i];
    piece.shape = {1, 1, fused.shape.back()};
    piece.strides.clear();
    piece.offset += i * fused.shape.back() * StoredElementSize(fused);
    out.push_back(std::move(piece));
  }
  return out;
}

bool SplitBlocks(std::vector<TensorRecord>* records) {
  std::vector<TensorRecord> parts;
  for (TensorRecord& record : *records) {
    if (!HasQuants(record.blocks) || !record.strides.empty() || record.shape.size() != 2 ||
        !IsMultipliedMatrix(record.name)) {
      continue;
    }
    parts.push_back(Part(record, BlockPart::kScales, ".scale"));
    if (HasMinimums(record.blocks)) parts.push_back(Part(record, BlockPart::kMinimums, ".min"));
    record = Part(record, BlockPart::kQuants, "");
  }
  const bool any = !parts.empty();
  std::move(parts.begin(), parts.end(), std::back_inserter(*records));
  return any;
}

}  // namespace rwkv::checkpoint
