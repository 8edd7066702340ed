// The longest of many byte strings that a text begins with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace rwkv::tokenizer {

// A trie in a double array: the child of state s by byte b is states_[s].base + b, if that state's parent is s.
// Immutable, hence thread-safe.
class ByteTrie {
 public:
  static constexpr uint32_t kNone = 0xFFFFFFFF;

  // `strings` by id; empty ones are left out. No two others may be alike.
  explicit ByteTrie(const std::vector<std::string>& strings);

  struct Match {
    uint32_t id = kNone;
    size_t size = 0;  // Bytes of the string.
  };
  // The longest string that `text` begins with.
  Match LongestPrefix(absl::string_view text) const {
    Match match;
    const State* const states = states_.data();
    int32_t state = 0;
    for (size_t i = 0; i < text.size(); ++i) {
      const int32_t next = states[state].base + static_cast<unsigned char>(text[i]);
      if (states[next].parent != state) break;
      state = next;
      if (states[state].id != kNone) match = {states[state].id, i + 1};
    }
    return match;
  }

 private:
  class Builder;

  struct State {
    int32_t base = 0;
    int32_t parent = -1;
    uint32_t id = kNone;  // Of the string that ends here.
  };
  std::vector<State> states_;
};

}  // namespace rwkv::tokenizer
