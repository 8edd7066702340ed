#include "services/tokenizer/byte_trie.h"

#include <algorithm>
#include <utility>

namespace rwkv::tokenizer {
namespace {

constexpr int32_t kAlphabet = 256;

}  // namespace

// Places the states in the double array.
class ByteTrie::Builder {
 public:
  // `strings` outlives the builder.
  explicit Builder(const std::vector<std::string>& strings) : strings_(strings) {
    for (uint32_t id = 0; id < strings.size(); ++id) {
      if (!strings[id].empty()) order_.push_back(id);
    }
    std::sort(order_.begin(), order_.end(), [&](uint32_t a, uint32_t b) { return strings_[a] < strings_[b]; });
  }

  std::vector<State> Build() && {
    Reserve(kAlphabet);
    states_[0].parent = kRoot;
    struct Pending {
      int32_t state;
      size_t begin, end, depth;  // The strings order_[begin, end) share their first `depth` bytes.
    };
    std::vector<Pending> pending = {{0, 0, order_.size(), 0}};
    while (!pending.empty()) {
      auto [state, begin, end, depth] = pending.back();
      pending.pop_back();
      if (begin < end && strings_[order_[begin]].size() == depth) states_[state].id = order_[begin++];
      std::vector<std::pair<unsigned char, size_t>> children;  // The byte, and where its strings begin.
      for (size_t i = begin; i < end; ++i) {
        const auto byte = static_cast<unsigned char>(strings_[order_[i]][depth]);
        if (children.empty() || children.back().first != byte) children.emplace_back(byte, i);
      }
      if (children.empty()) continue;
      const int32_t base = FindBase(children);
      states_[state].base = base;
      for (size_t c = 0; c < children.size(); ++c) {
        const int32_t child = base + children[c].first;
        states_[child].parent = state;
        pending.push_back(
            {child, children[c].second, c + 1 < children.size() ? children[c + 1].second : end, depth + 1});
      }
    }
    while (states_.back().parent == kFree) states_.pop_back();
    states_.resize(states_.size() + kAlphabet);  // So that base + byte is always inside.
    return std::move(states_);
  }

 private:
  static constexpr int32_t kFree = -1;
  static constexpr int32_t kRoot = -2;

  int32_t FindBase(const std::vector<std::pair<unsigned char, size_t>>& children) {
    // First fit from where the array was last nearly full; a few tries are enough to keep it four fifths full.
    while (states_[first_free_].parent != kFree) Reserve(++first_free_ + kAlphabet);
    constexpr int kTries = 256;
    int32_t base = std::max(0, first_free_ - children[0].first);
    for (int tries = 0; tries < kTries; ++tries, ++base) {
      Reserve(base + kAlphabet);
      if (std::all_of(children.begin(), children.end(),
                      [&](const auto& child) { return states_[base + child.first].parent == kFree; })) {
        return base;
      }
    }
    const auto end = static_cast<int32_t>(states_.size());
    Reserve(end + kAlphabet);
    // The slots passed over stay for single children; give up those far behind.
    first_free_ = std::max(first_free_, end - 16 * kAlphabet);
    return end;
  }

  void Reserve(int32_t size) {
    if (static_cast<size_t>(size) > states_.size()) states_.resize(size);
  }

  const std::vector<std::string>& strings_;
  std::vector<uint32_t> order_;  // Ids in order of their strings.
  std::vector<State> states_;
  int32_t first_free_ = 1;
};

ByteTrie::ByteTrie(const std::vector<std::string>& strings) : states_(Builder(strings).Build()) {}

}  // namespace rwkv::tokenizer
