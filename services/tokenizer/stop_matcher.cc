#include "services/tokenizer/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace rwkv::tokenizer {

StopMatcher::StopMatcher(std::vector<std::string> stops)
    : stops_(std::move(stops)), failure_(stops_.size()), matched_(stops_.size()) {
  for (size_t s = 0; s < stops_.size(); ++s) {
    const std::string& stop = stops_[s];
    // failure_[s][n]: length of the longest proper prefix of stop that ends its first n + 1 bytes.
    failure_[s].resize(stop.size());
    for (size_t n = 1, length = 0; n < stop.size(); ++n) {
      while (length > 0 && stop[n] != stop[length]) length = failure_[s][length - 1];
      if (stop[n] == stop[length]) ++length;
      failure_[s][n] = length;
    }
  }
}

StopMatcher::Result StopMatcher::Push(absl::string_view text) {
  Result result;
  result.stop = stop_;
  if (stop_.has_value()) return result;
  for (size_t i = 0; i < text.size(); ++i) {
    for (size_t s = 0; s < stops_.size(); ++s) {
      const std::string& stop = stops_[s];
      if (stop.empty()) continue;
      size_t& length = matched_[s];
      while (length > 0 && text[i] != stop[length]) length = failure_[s][length - 1];
      if (text[i] == stop[length]) ++length;
      if (length == stop.size() && (!stop_.has_value() || stop.size() > stops_[*stop_].size())) stop_ = s;
    }
    if (stop_.has_value()) {
      result.text = std::exchange(held_, "");
      result.text.append(text.data(), i + 1);
      result.text.resize(result.text.size() - stops_[*stop_].size());
      result.stop = stop_;
      return result;
    }
  }
  held_.append(text.data(), text.size());
  const size_t hold = matched_.empty() ? 0 : *std::max_element(matched_.begin(), matched_.end());
  result.text = held_.substr(0, held_.size() - hold);
  held_.erase(0, held_.size() - hold);
  return result;
}

std::string StopMatcher::Finish() { return std::exchange(held_, ""); }

}  // namespace rwkv::tokenizer
