// What a stopped embedded store holds, read as far as it can be read, whatever happened to its files. Nothing of the
// folder is changed: it works on a copy beside it, whose large files are links.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace rwkv::state_store {

struct Survey {
  std::string opening;  // What keeps the store from starting, in words; empty: nothing.
  // Rows that are whole, by key; for all of the catalog, so in memory.
  std::map<std::string, std::string> rows;
  int64_t unreadable_rows = 0;
  std::set<std::string> sessions;                // All that are known, be it by a broken row only.
  std::map<std::string, std::string> damaged;    // Sessions that cannot be served, and why.
  std::map<std::string, std::string> regressed;  // Sessions that are whole, but older than what was acknowledged.
  std::map<std::string, std::string> stateless;  // Sessions that lost states: they are made anew from the log.
  int64_t tokens = 0;
  int64_t snapshots = 0;
  int64_t records = 0;
  int64_t bad_records = 0;
  uint64_t next_id = 1;

  bool healthy() const {
    return opening.empty() && unreadable_rows == 0 && damaged.empty() && regressed.empty() && bad_records == 0;
  }
};

// kUnavailable: the store runs, or its folder cannot be read. kNotFound: there is no store.
absl::StatusOr<Survey> SurveyStore(const std::string& data_dir);

// The rows of the sessions of `survey` that are not damaged, as a catalog holds them: nothing that nobody reaches.
std::map<std::string, std::string> SurvivingRows(const Survey& survey);

}  // namespace rwkv::state_store
