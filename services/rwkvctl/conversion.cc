#include "services/rwkvctl/conversion.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "kernels/base/dtype.h"
#include "kernels/base/finite.h"
#include "kernels/base/matrix.h"
#include "kernels/base/quantize.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/checkpoint/formats/safetensors.h"
#include "services/checkpoint/formats/tensor_record.h"
#include "services/checkpoint/matrix_names.h"
#include "services/checkpoint/model_tensors.h"

namespace rwkv::rwkvctl {
namespace {

using checkpoint::ElementType;
using checkpoint::TensorInfo;

constexpr int64_t kGroup = 64;
constexpr int64_t kBytesAtOnce = 1 << 20;
constexpr char kGroupKey[] = "quantisation.group";  // So spelled in files that are there.

// Vectors and what acts like one; not worth rounding.
bool IsMatrix(const TensorInfo& info) {
  for (absl::string_view name : {".r_k", ".time_decay", ".time_first", ".time_faaaa", ".time_state"}) {
    if (absl::EndsWith(info.name, name)) return false;
  }
  return std::count_if(info.shape.begin(), info.shape.end(), [](int64_t size) { return size > 1; }) >= 2;
}

int64_t Rows(const TensorInfo& info) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < info.shape.size(); ++i) rows *= info.shape[i];
  return rows;
}

absl::string_view BytesOf(const void* data, int64_t size) {
  return {static_cast<const char*>(data), static_cast<size_t>(size)};
}

}  // namespace

struct Conversion::Codes {
  kernels::MatrixView view;  // Of no data: rows are read one after the other.
  std::vector<uint16_t> scales;
  std::vector<uint16_t> minimums;
};

absl::StatusOr<Precision> ParsePrecision(absl::string_view name) {
  constexpr std::pair<absl::string_view, Precision> kNames[] = {
      {"fp32", Precision::kFloat32}, {"bf16", Precision::kBFloat16}, {"fp16", Precision::kFloat16},
      {"int8", Precision::kInt8},    {"int4", Precision::kInt4},
  };
  for (const auto& [text, precision] : kNames) {
    if (name == text) return precision;
  }
  return absl::InvalidArgumentError(absl::StrCat("\"", name, "\" is none of fp32, bf16, fp16, int8 and int4"));
}

absl::StatusOr<Conversion> Conversion::Plan(std::shared_ptr<const checkpoint::Checkpoint> checkpoint,
                                            Precision precision, const std::vector<std::string>& left_out) {
  Conversion conversion(std::move(checkpoint), precision);
  RWKV_RETURN_IF_ERROR(conversion.PlanAll(left_out));
  return conversion;
}

absl::Status Conversion::PlanAll(const std::vector<std::string>& left_out) {
  const bool quantizes = precision_ == Precision::kInt8 || precision_ == Precision::kInt4;
  const bool is_float = !quantizes && precision_ != Precision::kAsStored;
  for (const TensorInfo& info : checkpoint_->tensors()) {
    if (absl::EndsWith(info.name, ".scale") || absl::EndsWith(info.name, ".min")) continue;  // With their matrix.
    if (std::binary_search(left_out.begin(), left_out.end(), info.name)) continue;
    Step step;
    step.info = &info;
    step.scale = checkpoint_->Find(absl::StrCat(info.name, ".scale"));
    step.minimum = checkpoint_->Find(absl::StrCat(info.name, ".min"));
    const bool is_quantized = step.scale != nullptr;
    if (is_quantized &&
        (info.shape.size() != 2 || step.scale->shape.size() != 2 || step.scale->type != ElementType::kFloat16 ||
         (info.type != ElementType::kInt8 && (info.type != ElementType::kUint8 || step.minimum == nullptr)))) {
      return absl::FailedPreconditionError(
          absl::StrCat(checkpoint_->path(), ": ", checkpoint::Quoted(info.name), " is not quantized as here"));
    }
    const bool is_weight = is_quantized || checkpoint::WeightDType(info.type).has_value();
    // Two codes make a byte of int4, so that an odd number of columns could not be told from the file.
    const bool fits =
        info.shape.size() == 2 && (precision_ != Precision::kInt4 || is_quantized || info.shape[1] % 2 == 0);
    if (quantizes && is_weight && fits && checkpoint::IsMultipliedMatrix(info.name)) {
      step.action = Action::kQuantize;
    } else if (is_float && is_weight && (is_quantized || precision_ == Precision::kFloat32 || IsMatrix(info))) {
      step.action = Action::kNarrow;
      step.type = precision_ == Precision::kFloat32    ? ElementType::kFloat32
                  : precision_ == Precision::kBFloat16 ? ElementType::kBFloat16
                                                       : ElementType::kFloat16;
    }
    AddStep(step);
  }
  const bool is_gguf = checkpoint_->format() == "gguf";
  for (const auto& [key, value] : checkpoint_->metadata()) {
    // GGUF's keys are of its own architecture, but for those; the template gets the name it has in safetensors.
    if (!is_gguf || absl::StartsWith(key, "general.")) metadata_.emplace(key, value);
    if (is_gguf && key == "tokenizer.chat_template") metadata_.emplace("template", value);
  }
  metadata_.erase(kGroupKey);
  if (quantizes) metadata_[kGroupKey] = absl::StrCat(kGroup);
  const auto group = checkpoint_->metadata().find(kGroupKey);
  if (precision_ == Precision::kAsStored && group != checkpoint_->metadata().end()) metadata_.insert(*group);
  return absl::OkStatus();
}

void Conversion::AddHeader(const std::string& name, ElementType type, std::vector<int64_t> shape) {
  const int64_t bytes = *checkpoint::ByteCount(shape, type);
  headers_.push_back(
      {name, std::string(checkpoint::SafetensorsName(type)), std::move(shape), static_cast<uint64_t>(bytes)});
  bytes_ += bytes;
}

void Conversion::AddStep(const Step& step) {
  const TensorInfo& info = *step.info;
  steps_.push_back(step);
  std::vector<int64_t> shape = info.shape;  // Of weights.
  if (step.scale != nullptr && info.type == ElementType::kUint8) shape[1] *= 2;
  switch (step.action) {
    case Action::kCopy:
      AddHeader(info.name, info.type, info.shape);
      for (const TensorInfo* part : {step.scale, step.minimum}) {
        if (part != nullptr) AddHeader(part->name, part->type, part->shape);
      }
      return;
    case Action::kNarrow:
      AddHeader(info.name, step.type, std::move(shape));
      return;
    case Action::kQuantize: {
      const bool is_int4 = precision_ == Precision::kInt4;
      const std::vector<int64_t> groups = {shape[0], (shape[1] + kGroup - 1) / kGroup};
      if (is_int4) shape[1] = (shape[1] + 1) / 2;
      AddHeader(info.name, is_int4 ? ElementType::kUint8 : ElementType::kInt8, std::move(shape));
      AddHeader(absl::StrCat(info.name, ".scale"), ElementType::kFloat16, groups);
      if (is_int4) AddHeader(absl::StrCat(info.name, ".min"), ElementType::kFloat16, groups);
      return;
    }
  }
}

absl::Status Conversion::ReadCodes(const Step& step, Codes* codes) const {
  codes->view.rows = Rows(*step.info);
  codes->view.cols = step.info->shape.empty() ? 1 : step.info->shape.back();
  if (step.scale == nullptr) return absl::OkStatus();
  const bool is_int4 = step.info->type == ElementType::kUint8;
  if (is_int4) codes->view.cols *= 2;
  codes->view.dtype = kernels::DType::kFloat16;
  codes->view.quantization = is_int4 ? kernels::Quantization::kInt4 : kernels::Quantization::kInt8;
  codes->view.group = checkpoint::QuantizationGroup(codes->view.cols, step.scale->shape[1]);
  const auto read = [&](const TensorInfo& info, std::vector<uint16_t>* out) {
    out->resize(info.bytes / 2);
    return checkpoint_->ReadBytes(info, 0, absl::MakeSpan(reinterpret_cast<uint8_t*>(out->data()), info.bytes));
  };
  RWKV_RETURN_IF_ERROR(read(*step.scale, &codes->scales));
  if (is_int4) RWKV_RETURN_IF_ERROR(read(*step.minimum, &codes->minimums));
  return absl::OkStatus();
}

// Rows first .. first + count - 1 as floats.
absl::Status Conversion::ReadRows(const Step& step, const Codes& codes, int64_t first, int64_t count,
                                  float* out) const {
  kernels::MatrixView view = codes.view;
  if (step.scale == nullptr) {
    return checkpoint_->ReadFloats(*step.info, first * view.cols, absl::MakeSpan(out, count * view.cols));
  }
  const int64_t row_bytes = kernels::RowBytes(view);
  std::vector<uint8_t> bytes(count * row_bytes);
  RWKV_RETURN_IF_ERROR(checkpoint_->ReadBytes(*step.info, first * row_bytes, absl::MakeSpan(bytes)));
  const int64_t groups = kernels::GroupsPerRow(view);
  view.data = bytes.data();
  view.scales = codes.scales.data() + first * groups;
  view.minimums = codes.minimums.empty() ? nullptr : codes.minimums.data() + first * groups;
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t col = 0; col < view.cols; ++col) out[row * view.cols + col] = kernels::LoadAsFloat(view, row, col);
  }
  return absl::OkStatus();
}

absl::Status Conversion::Copy(const TensorInfo& info, const AppendFunction& append) const {
  std::vector<uint8_t> bytes;
  for (int64_t at = 0; at < info.bytes; at += kBytesAtOnce) {
    bytes.resize(std::min(kBytesAtOnce, info.bytes - at));
    RWKV_RETURN_IF_ERROR(checkpoint_->ReadBytes(info, at, absl::MakeSpan(bytes)));
    RWKV_RETURN_IF_ERROR(append(BytesOf(bytes.data(), static_cast<int64_t>(bytes.size()))));
  }
  return absl::OkStatus();
}

absl::Status Conversion::WriteStep(const Step& step, const AppendFunction& append) const {
  if (step.action == Action::kCopy) {
    for (const TensorInfo* part : {step.info, step.scale, step.minimum}) {
      if (part != nullptr) RWKV_RETURN_IF_ERROR(Copy(*part, append));
    }
    return absl::OkStatus();
  }
  Codes codes;
  RWKV_RETURN_IF_ERROR(ReadCodes(step, &codes));
  const int64_t rows = codes.view.rows;
  const int64_t cols = codes.view.cols;
  if (rows == 0 || cols == 0) return absl::OkStatus();
  const int64_t rows_at_once = std::max<int64_t>(1, kBytesAtOnce / (cols * static_cast<int64_t>(sizeof(float))));

  const bool is_int4 = precision_ == Precision::kInt4;
  const kernels::Quantization quantization = is_int4 ? kernels::Quantization::kInt4 : kernels::Quantization::kInt8;
  const int64_t groups = (cols + kGroup - 1) / kGroup;
  const int64_t row_bytes = step.action == Action::kNarrow ? cols * checkpoint::ElementSize(step.type)
                            : is_int4                      ? (cols + 1) / 2
                                                           : cols;
  std::vector<uint16_t> scales(step.action == Action::kQuantize ? rows * groups : 0);
  std::vector<uint16_t> minimums(step.action == Action::kQuantize && is_int4 ? rows * groups : 0);
  std::vector<float> weights(rows_at_once * cols);
  std::vector<uint8_t> out(rows_at_once * row_bytes);
  for (int64_t first = 0; first < rows; first += rows_at_once) {
    const int64_t count = std::min(rows_at_once, rows - first);
    RWKV_RETURN_IF_ERROR(ReadRows(step, codes, first, count, weights.data()));
    const int64_t bad = kernels::FindNotFinite(kernels::DType::kFloat32, weights.data(), count * cols);
    if (bad >= 0) return absl::DataLossError(absl::StrCat("element ", first * cols + bad, " is ", weights[bad]));
    for (int64_t row = 0; row < count; ++row) {
      const float* from = &weights[row * cols];
      uint8_t* to = &out[row * row_bytes];
      if (step.action == Action::kQuantize) {
        RWKV_RETURN_IF_ERROR(kernels::QuantizeRow(quantization, kGroup, from, cols, to, &scales[(first + row) * groups],
                                                  is_int4 ? &minimums[(first + row) * groups] : nullptr));
        continue;
      }
      const kernels::DType dtype = *checkpoint::WeightDType(step.type);
      kernels::NarrowFromFloat(dtype, from, cols, to);
      if (const int64_t col = kernels::FindNotFinite(dtype, to, cols); col >= 0) {
        return absl::OutOfRangeError(absl::StrCat("element ", (first + row) * cols + col, ", ", from[col],
                                                  ", is too large for ", checkpoint::ElementTypeName(step.type)));
      }
    }
    RWKV_RETURN_IF_ERROR(append(BytesOf(out.data(), count * row_bytes)));
  }
  RWKV_RETURN_IF_ERROR(append(BytesOf(scales.data(), static_cast<int64_t>(scales.size() * sizeof(uint16_t)))));
  return append(BytesOf(minimums.data(), static_cast<int64_t>(minimums.size() * sizeof(uint16_t))));
}

absl::Status Conversion::Write(const AppendFunction& append) const {
  for (const Step& step : steps_) {
    absl::Status append_status;
    const auto checked_append = [&](absl::string_view bytes) {
      append_status = append(bytes);
      return append_status;
    };
    absl::Status status = WriteStep(step, checked_append);
    if (!append_status.ok()) return append_status;
    if (!status.ok()) {
      return absl::Status(status.code(), absl::StrCat(checkpoint_->path(), ": tensor ",
                                                      checkpoint::Quoted(step.info->name), ": ", status.message()));
    }
  }
  return absl::OkStatus();
}

}  // namespace rwkv::rwkvctl
