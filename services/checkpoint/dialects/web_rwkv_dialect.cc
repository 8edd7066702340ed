#include "services/checkpoint/dialects/web_rwkv_dialect.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "absl/types/optional.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/dialects/views.h"

namespace rwkv::checkpoint {
namespace {

bool IsOneOf(absl::string_view name, std::initializer_list<absl::string_view> names) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

bool IsVersion7(const std::vector<TensorRecord>& records) { return AnyNameEndsWith(records, ".att.r_k"); }

// The width is the embedding's; a square factor tells nothing.
bool HasTransposedFactors(const std::vector<TensorRecord>& records) {
  int64_t width = 0;
  for (const TensorRecord& record : records) {
    if (record.name == "emb.weight" && record.shape.size() == 2) width = record.shape[1];
  }
  bool transposed = false;
  for (const TensorRecord& record : records) {
    const absl::optional<LayerName> name = ParseLayerName(record.name, "blocks.");
    if (!name.has_value() || record.shape.size() != 2 || record.shape[0] == record.shape[1] ||
        !IsOneOf(name->rest, {"att.w1", "att.a1", "att.v1", "att.g1"})) {
      continue;
    }
    if (record.shape[0] == width) return false;
    transposed |= record.shape[1] == width;
  }
  return transposed;
}

// [5, D, R] of today's scripts to [5, R, D]; older ones have swapped the first two dimensions instead: [R, 5, D].
absl::Status TransposeSecondMixFactor(TensorRecord* record) {
  constexpr int64_t kMixed = 5;  // w, k, v, r, g
  if (record->shape.size() == 3 && record->shape[0] != kMixed && record->shape[1] == kMixed) {
    return Transpose(0, 1, record);
  }
  return Transpose(1, 2, record);
}

absl::Status ChangeVersion6(absl::string_view rest, int layer, TensorRecord* record) {
  if (rest == "att.time_mix_w2") {
    RWKV_RETURN_IF_ERROR(TransposeSecondMixFactor(record));
  } else if (IsOneOf(rest, {"att.time_mix_w1", "att.time_decay_w1", "att.time_decay_w2"})) {
    RWKV_RETURN_IF_ERROR(Transpose(0, 1, record));
  }
  if (absl::ConsumePrefix(&rest, "att.time_mix_")) {
    record->name = BlockName(layer, absl::StrCat("att.time_maa_", rest));
  } else if (absl::ConsumePrefix(&rest, "ffn.time_mix_")) {
    record->name = BlockName(layer, absl::StrCat("ffn.time_maa_", rest));
  }
  return absl::OkStatus();
}

absl::Status ChangeVersion7(absl::string_view rest, TensorRecord* record) {
  if (IsOneOf(rest, {"att.w1", "att.w2", "att.a1", "att.a2", "att.v1", "att.v2", "att.g1", "att.g2"})) {
    return Transpose(0, 1, record);
  }
  return absl::OkStatus();
}

}  // namespace

bool LooksLikeWebRwkv(const std::vector<TensorRecord>& records) {
  if (AnyNameEndsWith(records, ".att.time_mix_w1")) return true;
  if (IsVersion7(records)) return HasTransposedFactors(records);
  return std::any_of(records.begin(), records.end(), [](const TensorRecord& record) {
    if (!absl::EndsWith(record.name, ".att.time_first")) return false;
    return std::count_if(record.shape.begin(), record.shape.end(), [](int64_t size) { return size > 1; }) == 2;
  });
}

absl::Status WebRwkvToOriginal(std::vector<TensorRecord>* records) {
  const bool is_version_6 = AnyNameEndsWith(*records, ".att.time_mix_w1");
  const bool is_version_7 = IsVersion7(*records);
  for (TensorRecord& record : *records) {
    const std::string original = record.name;  // Of which `name` is a view.
    const absl::optional<LayerName> name = ParseLayerName(original, "blocks.");
    if (!name.has_value()) continue;
    if (is_version_6) RWKV_RETURN_IF_ERROR(ChangeVersion6(name->rest, name->layer, &record));
    if (is_version_7) RWKV_RETURN_IF_ERROR(ChangeVersion7(name->rest, &record));
    if (name->rest == "att.time_first") record.name = BlockName(name->layer, "att.time_faaaa");
    if (name->rest == "att.time_state") RWKV_RETURN_IF_ERROR(Transpose(1, 2, &record));
  }
  return absl::OkStatus();
}

}  // namespace rwkv::checkpoint
