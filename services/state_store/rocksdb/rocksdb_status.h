// The one place where rocksdb::Status becomes absl::Status.
#pragma once

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "rocksdb/status.h"

namespace rwkv::state_store {

// "context: what RocksDB says", on one line.
// No space: kResourceExhausted. Corruption: kDataLoss. Not found: kNotFound. Every other failure of the disk or of the
// engine, which may pass: kUnavailable. A misuse by us: kInternal.
absl::Status FromRocksdbStatus(const rocksdb::Status& status, absl::string_view context);

}  // namespace rwkv::state_store
