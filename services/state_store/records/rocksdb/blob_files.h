// RocksDB's blob files, read without RocksDB: what small records are when the list of files that names them is lost.
// RocksDB rebuilds such a list of its tables, and deletes the blob files, which the new one does not name.
#pragma once

#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "rocksdb/env.h"

namespace rwkv::state_store {

// Calls `visit` for each blob of the file whose checksums are right, among them those that were deleted since; after
// damage it goes on at the next. An error of `visit` ends it. kUnavailable: the file cannot be read.
absl::Status ForEachBlob(rocksdb::Env& env, const std::string& path,
                         absl::FunctionRef<absl::Status(absl::string_view key, absl::string_view value)> visit);

}  // namespace rwkv::state_store
