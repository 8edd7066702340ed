// Where the prefix cache keeps a state: by what it is of (scope and first tokens) and by a hash of all its tokens.
// Equal keys are no proof: who finds a row compares what is in it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/state_store/catalog/keys.h"
#include "services/state_store/rows/numbers.h"

namespace rwkv::state_store {

// The shortest prefix that has a state.
inline constexpr size_t kMinPrefixTokens = 16;

// FNV-1a, whose value after each token is the hash of those so far.
class PrefixHash {
 public:
  void Add(uint64_t number) {
    for (int shift = 0; shift < 64; shift += 8) AddByte(static_cast<uint8_t>(number >> shift));
  }
  void Add(absl::string_view text) {
    Add(text.size());
    for (const char c : text) AddByte(static_cast<uint8_t>(c));
  }
  uint64_t value() const { return value_; }

 private:
  void AddByte(uint8_t byte) { value_ = (value_ ^ byte) * 0x100000001b3; }
  uint64_t value_ = 0xcbf29ce484222325;
};

// Of at least kMinPrefixTokens tokens. What begins otherwise is never looked at.
inline uint64_t PrefixScopeHash(const v1::PrefixScope& scope, absl::Span<const uint32_t> token_ids) {
  PrefixHash hash;
  hash.Add(scope.tenant());
  hash.Add(scope.model_fingerprint());
  hash.Add(scope.numeric_family());
  hash.Add(scope.initial_state());
  for (const uint32_t id : token_ids.first(kMinPrefixTokens)) hash.Add(id);
  return hash.value();
}

// [i]: of the first i tokens.
inline std::vector<uint64_t> PrefixHashes(absl::Span<const uint32_t> token_ids) {
  std::vector<uint64_t> hashes;
  hashes.reserve(token_ids.size() + 1);
  PrefixHash hash;
  hashes.push_back(hash.value());
  for (const uint32_t id : token_ids) {
    hash.Add(id);
    hashes.push_back(hash.value());
  }
  return hashes;
}

inline std::string PrefixIndexKey(uint64_t scope, uint64_t position, uint64_t hash) {
  std::string key = NumberKey('x', scope, position);
  AppendNumber(key, hash);
  return key;
}

}  // namespace rwkv::state_store
