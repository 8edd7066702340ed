// Finds stop strings in text that comes in pieces.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/optional.h"

namespace rwkv::tokenizer {

// The match that is complete first wins; of several that end together the longest. Holds back only what may still
// become a stop string. All results joined are independent of where the pieces were cut. Not thread-safe.
class StopMatcher {
 public:
  // No string may be empty (an empty one never matches).
  explicit StopMatcher(std::vector<std::string> stops);

  struct Result {
    std::string text;             // May be shown now.
    absl::optional<size_t> stop;  // Index of the stop string that was met; `text` ends before it.
  };
  // After a match everything is dropped: text is empty, stop is the same.
  Result Push(absl::string_view text);
  std::string Finish();  // What was held back, when there was no match.

  const std::vector<std::string>& stops() const { return stops_; }

 private:
  std::vector<std::string> stops_;
  std::vector<std::vector<size_t>> failure_;  // Knuth-Morris-Pratt, per stop string.
  std::vector<size_t> matched_;               // How much of each is matched by the end of the text so far.
  std::string held_;
  absl::optional<size_t> stop_;
};

}  // namespace rwkv::tokenizer
