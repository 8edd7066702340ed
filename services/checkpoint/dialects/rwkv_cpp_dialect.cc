#include "services/checkpoint/dialects/rwkv_cpp_dialect.h"

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/dialects/views.h"
#include "services/checkpoint/formats/element_type.h"

namespace rwkv::checkpoint {
namespace {

absl::Status CheckHeader(const RwkvCppDirectory& directory) {
  int layers = 0;
  for (const TensorRecord& record : directory.tensors) {
    if (const absl::optional<LayerName> name = ParseLayerName(record.name, "blocks.")) {
      layers = std::max(layers, name->layer + 1);
    }
    if (record.name == "emb.weight" && record.shape != std::vector<int64_t>{directory.vocab_size, directory.width}) {
      return absl::InvalidArgumentError(absl::StrCat("rwkv.cpp: emb.weight is ", ShapeString(record.shape),
                                                     ", but the header says ", directory.vocab_size, " tokens of ",
                                                     directory.width));
    }
  }
  if (layers == directory.layer_count) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("rwkv.cpp: the header says ", directory.layer_count, " layers; there are tensors of ", layers));
}

// Marks what the converter applied; it keeps these tensors in fp32 whatever the file's type.
absl::Status TakeBack(Applied applied, TensorRecord* record) {
  if (record->type != ElementType::kFloat32 || record->blocks != BlockType::kNone) {
    return absl::InvalidArgumentError(absl::StrCat("rwkv.cpp: tensor ", Quoted(record->name), " is not fp32"));
  }
  record->applied = applied;
  return absl::OkStatus();
}

// Source of each case: rwkv.cpp python/convert_pytorch_to_ggml.py.
absl::Status ChangeVersion4(absl::string_view name, TensorRecord* record) {
  return name == "att.time_decay" ? TakeBack(Applied::kNegativeExp, record) : absl::OkStatus();
}

absl::Status ChangeVersion5(absl::string_view name, TensorRecord* record) {
  if (name == "att.time_decay") RWKV_RETURN_IF_ERROR(TakeBack(Applied::kExpNegativeExp, record));
  if (name == "att.time_first") RWKV_RETURN_IF_ERROR(TakeBack(Applied::kExp, record));
  const bool is_by_head = name == "att.time_decay" || name == "att.time_first" || name == "att.time_faaaa";
  if (!is_by_head) return absl::OkStatus();
  // [H, N, 1], or [H, 1, 1] where a head has one value.
  const int64_t heads = record->shape[0];
  const int64_t each = *ElementCount(record->shape) / heads;
  return Reshape(each == 1 ? std::vector<int64_t>{heads} : std::vector<int64_t>{heads, each}, record);
}

absl::Status ChangeVersion6(absl::string_view name, TensorRecord* record) {
  if (name == "att.time_maa_w1" || name == "att.time_decay_w1" || name == "att.time_decay_w2") {
    return Transpose(0, 1, record);
  }
  if (name == "att.time_maa_w2") return Transpose(1, 2, record);
  if (name == "att.time_decay") return Reshape({1, 1, *ElementCount(record->shape)}, record);
  if (name == "att.time_faaaa") {
    return Reshape({record->shape[0], *ElementCount(record->shape) / record->shape[0]}, record);
  }
  return absl::OkStatus();
}

absl::Status ChangeVersion7(absl::string_view name, TensorRecord* record) {
  for (absl::string_view factor : {"att.w1", "att.w2", "att.a1", "att.a2", "att.v1", "att.v2", "att.g1", "att.g2"}) {
    if (name == factor) return Transpose(0, 1, record);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<TensorRecord>> RwkvCppToOriginal(RwkvCppDirectory directory) {
  RWKV_RETURN_IF_ERROR(CheckHeader(directory));
  const auto change = AnyNameEndsWith(directory.tensors, ".att.r_k")           ? ChangeVersion7
                      : AnyNameEndsWith(directory.tensors, ".att.time_maa_x")  ? ChangeVersion6
                      : AnyNameEndsWith(directory.tensors, ".att.ln_x.weight") ? ChangeVersion5
                                                                               : ChangeVersion4;
  std::vector<TensorRecord> out;
  for (TensorRecord& record : directory.tensors) {
    const absl::optional<LayerName> name = ParseLayerName(record.name, "blocks.");
    if (name.has_value() && name->rest == "att.x_rwkvag") {
      std::vector<std::string> names;
      for (const char* piece : {"att.x_r", "att.x_w", "att.x_k", "att.x_v", "att.x_a", "att.x_g"}) {
        names.push_back(BlockName(name->layer, piece));
      }
      RWKV_ASSIGN_OR_RETURN(std::vector<TensorRecord> pieces, SplitFused(record, names));
      std::move(pieces.begin(), pieces.end(), std::back_inserter(out));
      continue;
    }
    if (name.has_value()) RWKV_RETURN_IF_ERROR(change(name->rest, &record));
    out.push_back(std::move(record));
  }
  return out;
}

}  // namespace rwkv::checkpoint
