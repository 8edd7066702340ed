// Giving the space of what was deleted back to the disk.
//
// RocksDB does that by itself only as a by-product of writing: what an idle store has deleted stays on the disk, first
// behind tombstones in memory and in the log, then as garbage in blob files. So this drives it:
//   flush (the log goes) ──► compact keys (tombstones meet what they delete) ──► rewrite blob files that hold garbage
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "rocksdb/db.h"
#include "services/state_store/rocksdb/database.h"

namespace rwkv::state_store {

// Of one blob file, or of all.
struct BlobBytes {
  uint64_t total = 0;
  uint64_t garbage = 0;
};

// How many of `files`, the oldest first, are to be rewritten: as few as leave no more garbage than is worth it. That is
// none, as long as rewriting is cheap (what lives in these files is at most kCheapBytes), else a fifth of what lives;
// so a large store writes at most four bytes for one that it gives back, unless its oldest files hold none.
size_t FilesToRewrite(absl::Span<const BlobBytes> files);
inline constexpr uint64_t kCheapBytes = uint64_t{256} << 20;

// Whether a family of so many keys, so many of them deletions, in files of so many bytes, is to be compacted.
bool ShouldCompact(uint64_t entries, uint64_t deletions, uint64_t file_bytes);

// One round, for minutes if there is much to do. Ends soon with kCancelled when `*canceled` becomes true. `families`:
// the handles, in the order of Family.
absl::Status ReclaimSpace(rocksdb::DB& db, absl::Span<rocksdb::ColumnFamilyHandle* const> families,
                          std::atomic<bool>* canceled);

}  // namespace rwkv::state_store
