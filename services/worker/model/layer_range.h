// Which layers of a model one pipeline stage computes.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace rwkv::worker {

// Layers begin .. end-1. The first stage (begin = 0) also embeds, the last (end = L) also makes logits.
struct LayerRange {
  int begin = 0;
  int end = 0;

  int size() const { return end - begin; }
  std::string ToString() const;  // "0:6"
};

inline bool operator==(const LayerRange& a, const LayerRange& b) { return a.begin == b.begin && a.end == b.end; }
inline bool operator!=(const LayerRange& a, const LayerRange& b) { return !(a == b); }

// "BEGIN:END", 0 <= BEGIN < END <= layer_count. kInvalidArgument otherwise.
absl::StatusOr<LayerRange> ParseLayerRange(absl::string_view text, int layer_count);

// "I/S": stage I of S, 0 <= I < S <= layer_count. The split is by layers alone and as even as it can be: the first
// layer_count % S stages have one layer more, which leaves the last stage, with its head, the smaller share.
absl::StatusOr<LayerRange> ParseStage(absl::string_view text, int layer_count);
// The same, and "ordinal/COUNT": the index is the number at the end of `name` ("worker-5"), modulo COUNT.
absl::StatusOr<LayerRange> ParseStageOf(absl::string_view name, absl::string_view text, int layer_count);
absl::StatusOr<LayerRange> LayersOfStage(int stage_index, int stage_count, int layer_count);

}  // namespace rwkv::worker
