#include "services/router/prefix_cache/recent_inputs.h"

#include <algorithm>

namespace rwkv::router {

uint64_t RecentInputs::Add(absl::string_view scope, absl::Span<const uint32_t> tokens) {
  if (tokens.size() > kMostTokens) return 0;
  uint64_t shared = 0;
  for (auto it = inputs_.begin(); it != inputs_.end();) {
    if (it->scope != scope) {
      ++it;
      continue;
    }
    const auto differs = std::mismatch(tokens.begin(), tokens.end(), it->tokens.begin(), it->tokens.end());
    const uint64_t same = static_cast<uint64_t>(differs.first - tokens.begin());
    shared = std::max(shared, same);
    const bool contained = same == it->tokens.size();
    if (contained) tokens_ -= it->tokens.size();
    it = contained ? inputs_.erase(it) : std::next(it);
  }
  inputs_.push_front({std::string(scope), std::vector<uint32_t>(tokens.begin(), tokens.end())});
  tokens_ += tokens.size();
  while (inputs_.size() > kMostInputs || tokens_ > kMostTokens) {
    tokens_ -= inputs_.back().tokens.size();
    inputs_.pop_back();
  }
  return shared;
}

}  // namespace rwkv::router
