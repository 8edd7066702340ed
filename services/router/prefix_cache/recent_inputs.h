// How much of an input an earlier one began with: where two that share a beginning part, the next one that has it
// should find a state. By scope: what is not of the same tenant, model and tuned state is never compared.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace rwkv::router {

// Not thread-safe.
class RecentInputs {
 public:
  static constexpr size_t kMostInputs = 64;
  static constexpr size_t kMostTokens = 1 << 20;  // Of all together.

  // The longest beginning that it shares with one of those before; then it is one of them, in place of one that it
  // begins with.
  uint64_t Add(absl::string_view scope, absl::Span<const uint32_t> tokens);

 private:
  struct Input {
    std::string scope;
    std::vector<uint32_t> tokens;
  };
  std::list<Input> inputs_;  // The newest first.
  size_t tokens_ = 0;
};

}  // namespace rwkv::router
