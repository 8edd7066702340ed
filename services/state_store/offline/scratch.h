// A copy of a stopped store's folder to try things on: large files are links, which RocksDB never writes to.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "rocksdb/env.h"
#include "services/common/metrics.h"
#include "services/state_store/rocksdb/database.h"

namespace rwkv::state_store {

// What a repair has made is in one of these folders of DIR until it is in DIR itself: in the first while the damaged
// files go, in the second while what it made comes in their place. (While it is made, in .repaired.)
inline constexpr char kRepairReady[] = "/.repaired.ready";
inline constexpr char kRepairMoving[] = "/.repaired.moving";
// Whether one was broken off there. Until it is repaired again, the store does not start.
bool IsRepairBrokenOff(const std::string& data_dir);

// The lock that a store holds as long as it runs: nobody starts one in the folder, or repairs it, meanwhile.
class FolderLock {
 public:
  // kUnavailable: the store runs, or is being checked or repaired. kNotFound: there is none.
  static absl::StatusOr<std::unique_ptr<FolderLock>> Take(const std::string& data_dir);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;

 private:
  explicit FolderLock(rocksdb::FileLock* lock) : lock_(lock) {}

  rocksdb::FileLock* const lock_;
};

// Makes DIR/.survey. Under the folder's lock. kUnavailable: it cannot. kFailedPrecondition: IsRepairBrokenOff().
absl::StatusOr<std::string> CopyToScratch(const std::string& data_dir);

// Files of rows of which nothing can be read. After OpenScratch().
int64_t CountLostTables(const std::string& scratch);

// Opens it by whatever means; *why: what keeps a store from opening it, empty if nothing does.
absl::StatusOr<std::unique_ptr<Database>> OpenScratch(const std::string& scratch, common::Metrics* metrics,
                                                      std::string* why);

// Tables that were there before a start, of this database or of the one that was copied (rocksdb/kept_tables.h).
bool HasKeptTables(const std::string& scratch);
// A database of these and of those that are there now, as far as they are intact. The one in `scratch` is closed.
absl::StatusOr<std::unique_ptr<Database>> OpenAllTables(const std::string& scratch, common::Metrics* metrics);

}  // namespace rwkv::state_store
