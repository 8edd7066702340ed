#include "services/worker/model/layer_range.h"

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/types/optional.h"

namespace rwkv::worker {
namespace {

// Digits only: SimpleAtoi alone would take signs and blanks.
absl::optional<int> ParseNumber(absl::string_view text) {
  int value = 0;
  if (text.empty() || !std::all_of(text.begin(), text.end(), absl::ascii_isdigit) || !absl::SimpleAtoi(text, &value)) {
    return absl::nullopt;
  }
  return value;
}

// "A<separator>B".
absl::optional<std::pair<int, int>> ParsePair(absl::string_view text, char separator) {
  const std::vector<absl::string_view> parts = absl::StrSplit(text, separator);
  if (parts.size() != 2) return absl::nullopt;
  const absl::optional<int> first = ParseNumber(parts[0]);
  const absl::optional<int> second = ParseNumber(parts[1]);
  if (!first.has_value() || !second.has_value()) return absl::nullopt;
  return std::make_pair(*first, *second);
}

}  // namespace

std::string LayerRange::ToString() const { return absl::StrCat(begin, ":", end); }

absl::StatusOr<LayerRange> ParseLayerRange(absl::string_view text, int layer_count) {
  const absl::optional<std::pair<int, int>> range = ParsePair(text, ':');
  if (!range.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat("layers \"", text, "\" are not of the form BEGIN:END"));
  }
  if (range->first >= range->second || range->second > layer_count) {
    return absl::InvalidArgumentError(absl::StrCat("layers ", text, " are not a part of the model's 0:", layer_count));
  }
  return LayerRange{range->first, range->second};
}

absl::StatusOr<LayerRange> ParseStage(absl::string_view text, int layer_count) {
  const absl::optional<std::pair<int, int>> stage = ParsePair(text, '/');
  if (!stage.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat("stage \"", text, "\" is not of the form INDEX/COUNT"));
  }
  return LayersOfStage(stage->first, stage->second, layer_count);
}

absl::StatusOr<LayerRange> ParseStageOf(absl::string_view name, absl::string_view text, int layer_count) {
  absl::string_view count_text = text;
  if (!absl::ConsumePrefix(&count_text, "ordinal/")) return ParseStage(text, layer_count);
  const size_t dash = name.rfind('-');
  const absl::optional<int> ordinal =
      dash == absl::string_view::npos ? absl::nullopt : ParseNumber(name.substr(dash + 1));
  if (!ordinal.has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat("stage \"", text, "\": the name \"", name, "\" does not end with -NUMBER"));
  }
  const absl::optional<int> count = ParseNumber(count_text);
  if (!count.has_value() || *count < 1) {
    return absl::InvalidArgumentError(absl::StrCat("stage \"", text, "\" is not of the form ordinal/COUNT"));
  }
  return LayersOfStage(*ordinal % *count, *count, layer_count);
}

absl::StatusOr<LayerRange> LayersOfStage(int stage_index, int stage_count, int layer_count) {
  if (stage_index < 0 || stage_index >= stage_count) {
    return absl::InvalidArgumentError(
        absl::StrCat("stage ", stage_index, "/", stage_count, " does not exist: stages count from 0 to COUNT-1"));
  }
  if (stage_count > layer_count) {
    return absl::InvalidArgumentError(absl::StrCat("stage ", stage_index, "/", stage_count, ": the model has only ",
                                                   layer_count, " layers to share"));
  }
  const int even = layer_count / stage_count;
  const int longer = layer_count % stage_count;  // Stages that have one more.
  const int begin = stage_index * even + std::min(stage_index, longer);
  return LayerRange{begin, begin + even + (stage_index < longer ? 1 : 0)};
}

}  // namespace rwkv::worker
