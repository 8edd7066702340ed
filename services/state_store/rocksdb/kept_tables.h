// A database's tables as they were before it was opened, kept until it is known to hold all that was acknowledged.
// RocksDB takes a list of files (MANIFEST) that was cut for a shorter one, and deletes the tables that came after. They
// are links to them, in a folder in the database's, which `rwkvctl store repair` reads (offline/kept_rows.h).
#pragma once

#include <string>

#include "rocksdb/env.h"

namespace rwkv::state_store {

inline constexpr char kKeptTables[] = "/kept";  // In the database's folder.

// Adds to those that are there. Where the file system has no links, that is logged, and nothing is kept.
void KeepTables(rocksdb::Env& env, const std::string& data_dir);
// What cannot be removed goes at the next start.
void DropKeptTables(rocksdb::Env& env, const std::string& data_dir);

}  // namespace rwkv::state_store
