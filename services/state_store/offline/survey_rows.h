// The rows of a stopped store's catalog, as far as they can be read.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "absl/status/status.h"
#include "services/state_store/offline/survey.h"
#include "services/state_store/rocksdb/database.h"

namespace rwkv::state_store {

// Whom the loss of a row that is no session's touches.
void NoteLost(const std::string& key, const char* why, Survey& survey);

// Into survey.rows, with the checksum of each in `seals`: from both ends up to the first and the last block that cannot
// be read, then on from keys between them that may be there. Blocks with a wrong checksum are not looked into: RocksDB
// ends the process over some of them.
absl::Status ReadRows(Database& database, Survey& survey, std::map<std::string, uint32_t>& seals);

}  // namespace rwkv::state_store
