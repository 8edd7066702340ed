// The rows of the catalog's column family. Numbers are big-endian, so that keys sort as numbers do.
//
//   s SESSION                 SessionRow
//   t SESSION 0 SEQUENCE      TurnRow
//   b BRANCH                  BranchRow
//   e PARENT POSITION CHILD   nothing: one for each branch that forks off another, by fork position
//   l BRANCH BEGIN            LogChunk: the tokens of [BEGIN, BEGIN + n), one row per append
//   p BRANCH POSITION         SnapshotManifest
//   m BRANCH                  SnapshotManifest of the base: what an imported log without its beginning stands on. Of a
//                             branch without parent, and for as long as the branch is there
//   i SNAPSHOT                BRANCH POSITION: where a snapshot (or base) of that id is
//   d SNAPSHOT                when it was condemned, 8 bytes: its records are being deleted, nobody may commit it
//   u MINUTE SESSION          nothing: one for each session, by the minute of its last use (SessionRow.idle_minute)
//   g TENANT                  UsageRow of the tenant's sessions that are no more
//   g TENANT 0 SOURCE         UsageRow that somebody counts by himself: turns without a session
//   c SNAPSHOT                PrefixRow: a state of the prefix cache
//   x SCOPE POSITION HASH     PrefixUseRow: the same, by hashes (prefix_keys.h) of what it is of and of its tokens
//   y MINUTE SNAPSHOT         its x-key: the same, by its last use
//   "next_id"                 the first number that is not reserved for branches and fencing tokens (embedded only)
//
// A branch's chunks are gapless: they cover [fork position, end), where end is the session's length for a head, and for
// the others the highest fork position below them.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "services/state_store/rows/numbers.h"

namespace rwkv::state_store {

inline std::string NumberKey(char kind, uint64_t first) {
  std::string key(1, kind);
  AppendNumber(key, first);
  return key;
}

inline std::string NumberKey(char kind, uint64_t first, uint64_t second) {
  std::string key = NumberKey(kind, first);
  AppendNumber(key, second);
  return key;
}

inline std::string SessionKey(absl::string_view session_id) { return absl::StrCat("s", session_id); }
inline std::string BranchKey(uint64_t branch) { return NumberKey('b', branch); }
inline std::string EdgeKey(uint64_t parent, uint64_t fork_position, uint64_t child) {
  std::string key = NumberKey('e', parent, fork_position);
  AppendNumber(key, child);
  return key;
}
inline std::string LogKey(uint64_t branch, uint64_t begin) { return NumberKey('l', branch, begin); }
inline std::string SnapshotKey(uint64_t branch, uint64_t position) { return NumberKey('p', branch, position); }
inline std::string BaseKey(uint64_t branch) { return NumberKey('m', branch); }
inline std::string SnapshotIdKey(absl::string_view snapshot_id) { return absl::StrCat("i", snapshot_id); }

inline std::string CondemnedKey(absl::string_view snapshot_id) { return absl::StrCat("d", snapshot_id); }

inline std::string UsageKey(absl::string_view tenant) { return absl::StrCat("g", tenant); }
inline std::string UsageKey(absl::string_view tenant, absl::string_view source) {
  return absl::StrCat("g", tenant, absl::string_view("\0", 1), source);
}

inline std::string PrefixKey(absl::string_view snapshot_id) { return absl::StrCat("c", snapshot_id); }
inline std::string PrefixUseKey(uint64_t minute, absl::string_view snapshot_id) {
  return absl::StrCat(NumberKey('y', minute), snapshot_id);
}
// Of rows that are a cache, and may be lost without a loss.
inline bool IsCacheKey(absl::string_view key) {
  return !key.empty() && (key[0] == 'c' || key[0] == 'x' || key[0] == 'y');
}

inline std::string IdleKey(uint64_t minute, absl::string_view session_id) {
  return absl::StrCat(NumberKey('u', minute), session_id);
}
// Of an IdleKey.
inline absl::string_view IdleSessionId(absl::string_view key) { return key.substr(9); }

// Ids hold no zero byte, so no session's turns lie among another's.
inline std::string TurnKey(absl::string_view session_id, uint64_t sequence) {
  std::string key = absl::StrCat("t", session_id);
  key.push_back('\0');
  AppendNumber(key, sequence);
  return key;
}

// Of keys of two numbers or more.
inline uint64_t FirstNumber(absl::string_view key) { return NumberAt(key, 1); }
inline uint64_t SecondNumber(absl::string_view key) { return NumberAt(key, 9); }

// A row of the log: tokens, and log-probabilities if they were generated. Bytes: 'i' or 'g', then 4 a token,
// little-endian, then for 'g' 4 a log-probability.
struct LogChunk {
  std::vector<uint32_t> token_ids;
  std::vector<float> logprobs;  // Empty for input.
};

inline std::string EncodeChunk(absl::Span<const uint32_t> token_ids, absl::Span<const float> logprobs) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "rows are little-endian");
  std::string bytes(1 + 4 * (token_ids.size() + logprobs.size()), logprobs.empty() ? 'i' : 'g');
  std::memcpy(bytes.data() + 1, token_ids.data(), 4 * token_ids.size());
  if (!logprobs.empty()) std::memcpy(bytes.data() + 1 + 4 * token_ids.size(), logprobs.data(), 4 * logprobs.size());
  return bytes;
}

// nullopt: not a chunk.
inline absl::optional<LogChunk> DecodeChunk(absl::string_view bytes) {
  if (bytes.empty() || (bytes[0] != 'i' && bytes[0] != 'g')) return absl::nullopt;
  const bool generated = bytes[0] == 'g';
  const size_t unit = generated ? 8 : 4;
  bytes.remove_prefix(1);
  if (bytes.empty() || bytes.size() % unit != 0) return absl::nullopt;
  LogChunk chunk;
  chunk.token_ids.resize(bytes.size() / unit);
  std::memcpy(chunk.token_ids.data(), bytes.data(), 4 * chunk.token_ids.size());
  if (generated) {
    chunk.logprobs.resize(chunk.token_ids.size());
    std::memcpy(chunk.logprobs.data(), bytes.data() + 4 * chunk.token_ids.size(), 4 * chunk.logprobs.size());
  }
  return chunk;
}

}  // namespace rwkv::state_store
