#include "services/router/prefix_cache/prefix_ends.h"

#include <algorithm>

namespace rwkv::router {

std::vector<uint64_t> PrefixEnds(const PrefixCacheOptions& options, uint64_t tokens, absl::Span<const uint64_t> marks,
                                 uint64_t shared) {
  std::vector<uint64_t> ends;
  if (!options.enabled || tokens <= kShortestPrefix) return ends;
  const uint64_t last = tokens - 1;
  for (const uint64_t mark : marks) {
    if (mark >= kShortestPrefix) ends.push_back(std::min(mark, last));
  }
  const uint64_t least = std::max(options.min_tokens, kShortestPrefix);
  if (last >= least) {
    uint64_t chunk = options.chunk_tokens;
    while (last / chunk > kMostChunks) chunk *= 2;
    for (uint64_t end = chunk; end <= last; end += chunk) {
      if (end >= least) ends.push_back(end);
    }
    if (shared >= least) ends.push_back(std::min(shared, last));
    ends.push_back(last);
  }
  std::sort(ends.begin(), ends.end());
  ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
  ends.erase(std::upper_bound(ends.begin(), ends.end(), kLongestPrefix), ends.end());
  return ends;
}

}  // namespace rwkv::router
