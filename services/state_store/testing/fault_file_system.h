// A file system for tests that can be full, broken or slow, and that knows what a crash of the machine would leave.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "rocksdb/env.h"
#include "rocksdb/file_system.h"
#include "rocksdb/io_status.h"

namespace rwkv::state_store {

// Over the operating system's files. Thread-safe.
class FaultFileSystem final : public rocksdb::FileSystemWrapper {
 public:
  FaultFileSystem();

  const char* Name() const override { return "FaultFileSystem"; }

  // From now on whatever writes (append, sync, create) fails with `error`; OK ends it. An append leaves half of its
  // bytes in the file, as a disk that fills up does.
  void FailWritesWith(rocksdb::IOStatus error) ABSL_LOCKS_EXCLUDED(mu_);
  // Only fsyncs fail: what was appended is all in the file, yet no later fsync makes it durable, as with a kernel that
  // tells of a failed write once.
  void FailSyncsWith(rocksdb::IOStatus error) ABSL_LOCKS_EXCLUDED(mu_);
  // Every fsync takes at least so long.
  void SlowSyncs(absl::Duration duration) ABSL_LOCKS_EXCLUDED(mu_);

  // Copies `from` to the new folder `to` as a crash at this moment would leave it: of each file what was fsynced; files
  // and folders whose own folder was not fsynced since they were made are not there. `survives`, if given, names paths
  // that the kernel had written out all the same: whole, and there. (Renames and deletions are taken to be durable.)
  void CopyAsAfterCrash(const std::string& from, const std::string& to,
                        const std::function<bool(const std::string& path)>& survives = nullptr)
      ABSL_LOCKS_EXCLUDED(mu_);

  rocksdb::IOStatus NewWritableFile(const std::string& path, const rocksdb::FileOptions& options,
                                    std::unique_ptr<rocksdb::FSWritableFile>* file,
                                    rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus ReopenWritableFile(const std::string& path, const rocksdb::FileOptions& options,
                                       std::unique_ptr<rocksdb::FSWritableFile>* file,
                                       rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus ReuseWritableFile(const std::string& path, const std::string& old_path,
                                      const rocksdb::FileOptions& options,
                                      std::unique_ptr<rocksdb::FSWritableFile>* file,
                                      rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus RenameFile(const std::string& from, const std::string& to, const rocksdb::IOOptions& options,
                               rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus DeleteFile(const std::string& path, const rocksdb::IOOptions& options,
                               rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus CreateDirIfMissing(const std::string& path, const rocksdb::IOOptions& options,
                                       rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus NewDirectory(const std::string& path, const rocksdb::IOOptions& options,
                                 std::unique_ptr<rocksdb::FSDirectory>* directory,
                                 rocksdb::IODebugContext* debug) override;

 private:
  class File;
  class Directory;

  struct Length {
    uint64_t written = 0;
    uint64_t synced = 0;
    std::vector<std::pair<uint64_t, uint64_t>> lost;  // Ranges whose fsync failed.
  };

  rocksdb::IOStatus WriteError() ABSL_LOCKS_EXCLUDED(mu_);
  rocksdb::IOStatus SyncError() ABSL_LOCKS_EXCLUDED(mu_);
  std::unique_ptr<rocksdb::FSWritableFile> Wrap(const std::string& path, std::unique_ptr<rocksdb::FSWritableFile> file)
      ABSL_LOCKS_EXCLUDED(mu_);

  absl::Mutex mu_;
  rocksdb::IOStatus error_ ABSL_GUARDED_BY(mu_);
  rocksdb::IOStatus sync_error_ ABSL_GUARDED_BY(mu_);
  absl::Duration sync_duration_ ABSL_GUARDED_BY(mu_);
  // Shared with the open file, since RocksDB renames files that it has open.
  std::map<std::string, std::shared_ptr<Length>> lengths_ ABSL_GUARDED_BY(mu_);
  // Of files and folders whose own folder was not fsynced since they were made.
  std::set<std::string> new_names_ ABSL_GUARDED_BY(mu_);
};

}  // namespace rwkv::state_store
