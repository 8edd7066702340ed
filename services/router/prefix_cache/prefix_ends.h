// Where the state of an input is kept for others that begin alike.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace rwkv::router {

struct PrefixCacheOptions {
  bool enabled = false;
  uint64_t min_tokens = 256;    // What is shorter is read anew, unless the request marks it. At least kShortestPrefix.
  uint64_t chunk_tokens = 512;  // > 0. Kept at multiples of it, or of a power of two of it; see kMostChunks.
};

// Of any prefix that is kept, or looked for, as the state store has it.
inline constexpr uint64_t kShortestPrefix = 16;
inline constexpr uint64_t kLongestPrefix = 1 << 19;
// Multiples of the chunk that one input is kept at: a long input has larger chunks.
inline constexpr uint64_t kMostChunks = 8;

// Ascending. `marks`: what the request says. `shared`: how much of it an input of late began with, 0: nothing. The last
// end is before the last token, since who sends the same input wants what comes after all of it. None is beyond that, or
// kLongestPrefix.
std::vector<uint64_t> PrefixEnds(const PrefixCacheOptions& options, uint64_t tokens, absl::Span<const uint64_t> marks,
                                 uint64_t shared);

}  // namespace rwkv::router
