// What rows that are lost were of, for words about them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "services/state_store/catalog/keys.h"

namespace rwkv::state_store {

// Of lost rows how many are a loss: those of a cache are not.
inline int64_t CountLoss(const std::vector<std::string>& keys) {
  return std::count_if(keys.begin(), keys.end(), [](const std::string& key) { return !IsCacheKey(key); });
}

// The sessions that the keys name. Rows of branches name none; a change of a session's log always changes its own row.
inline std::set<std::string> LostSessions(const std::vector<std::string>& keys) {
  std::set<std::string> sessions;
  for (const std::string& key : keys) {
    if (key.size() > 1 && key[0] == 's') sessions.insert(key.substr(1));
    if (key.size() > 1 && key[0] == 't') sessions.insert(key.substr(1, key.find('\0') - 1));
  }
  return sessions;
}

// "3 sessions (a, b, c)"; of many the first.
inline std::string SessionNames(const std::set<std::string>& sessions) {
  constexpr size_t kNamed = 8;
  std::vector<std::string> named(sessions.begin(), std::next(sessions.begin(), std::min(sessions.size(), kNamed)));
  if (named.size() < sessions.size()) named.push_back("...");
  return absl::StrCat(sessions.size(), sessions.size() == 1 ? " session" : " sessions", named.empty() ? "" : " (",
                      absl::StrJoin(named, ", "), named.empty() ? "" : ")");
}

}  // namespace rwkv::state_store
