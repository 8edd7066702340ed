// How the database's files are laid out: its families and their options, its folder, and what older builds wrote.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "rocksdb/cache.h"
#include "rocksdb/db.h"
#include "rocksdb/env.h"
#include "rocksdb/options.h"
#include "services/state_store/rocksdb/database.h"

namespace rwkv::state_store {

// The family that held the catalog's rows in format 1, without checksums.
inline constexpr char kFormerCatalog[] = "catalog";

rocksdb::ColumnFamilyOptions FamilyOptions(Family family, const std::shared_ptr<rocksdb::Cache>& block_cache);
std::string FamilyName(Family family);

// Whether a file can be written and fsynced. At start RocksDB would find out too, but only in the middle of its
// recovery and with a message to match; later this tells whether it is worth disturbing RocksDB.
absl::Status CheckWritable(rocksdb::Env& env, const std::string& data_dir, const std::string& name);

// Copies the rows of format 1 to `rows`, with checksums, durably. Doing it again is fine. Returns how many.
absl::StatusOr<int64_t> CopyFormerRows(rocksdb::DB& db, rocksdb::ColumnFamilyHandle* former,
                                       rocksdb::ColumnFamilyHandle* rows, const std::string& name);

}  // namespace rwkv::state_store
