// What a stopped embedded store holds, read as far as it can be read, whatever happened to its files. Nothing of the
// folder is changed: it works on a copy beside it, whose large files are links.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

namespace rwkv::state_store {

// Keys of which nothing is known: those between two that have been read. Empty: the beginning, the end.
struct Gap {
  std::string after, before;

  bool Holds(const std::string& key) const { return key > after && (before.empty() || key < before); }
};

struct Survey {
  std::string opening;  // What keeps the store from starting, in words; empty: nothing.
  // Rows that are whole, by key; for all of the catalog, so in memory.
  std::map<std::string, std::string> rows;
  int64_t unreadable_rows = 0;
  int64_t unreadable_tables = 0;  // Files of rows of which nothing can be read.
  int64_t kept_rows = 0;          // Taken from tables that the list of files does not name.
  // Blocks of rows that cannot be read, by keys.
  std::vector<Gap> gaps;
  std::set<std::string> sessions;                // All that are known, be it by a broken row only.
  std::map<std::string, std::string> damaged;    // Sessions that cannot be served, and why.
  std::map<std::string, std::string> regressed;  // Sessions that are whole, but older than what was acknowledged.
  std::map<std::string, std::string> stateless;  // Sessions that lost states: they are made anew from the log.
  std::map<std::string, std::string> usage;      // Tenants of whose use a part is not known, and why.
  // Snapshots whose rows are lost, by branch and position.
  std::set<std::pair<uint64_t, uint64_t>> lost_snapshots;
  int64_t tokens = 0;
  int64_t snapshots = 0;
  int64_t records = 0;
  int64_t bad_records = 0;
  uint64_t next_id = 1;

  bool InGap(const std::string& key) const {
    return std::any_of(gaps.begin(), gaps.end(), [&](const Gap& gap) { return gap.Holds(key); });
  }
  bool healthy() const {
    return opening.empty() && unreadable_rows == 0 && unreadable_tables == 0 && gaps.empty() && damaged.empty() &&
           regressed.empty() && stateless.empty() && usage.empty() && bad_records == 0;
  }
};

// Under the folder's lock (scratch.h). kUnavailable: the folder cannot be read. kFailedPrecondition: a repair of it was
// broken off.
absl::StatusOr<Survey> SurveyStore(const std::string& data_dir);

// The rows of the sessions of `survey` that are not damaged, as a catalog holds them: nothing that nobody reaches. And
// what tenants have used.
std::map<std::string, std::string> SurvivingRows(const Survey& survey);

}  // namespace rwkv::state_store
