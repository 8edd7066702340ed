#include "services/state_store/rocksdb/directories.h"

#include <memory>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/state_store/rocksdb/rocksdb_status.h"

namespace rwkv::state_store {
namespace {

std::string ParentOf(const std::string& path) {
  const size_t slash = path.find_last_of('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

}  // namespace

absl::Status MakeDirectories(rocksdb::Env& env, const std::string& path, const std::string& name) {
  for (size_t slash = path.find('/', 1);; slash = path.find('/', slash + 1)) {
    const std::string part = path.substr(0, slash);
    bool is_directory = false;
    if (env.FileExists(part).ok()) {
      if (env.IsDirectory(part, &is_directory).ok() && !is_directory) {
        return absl::FailedPreconditionError(absl::StrCat(name, ": ", part, " is not a directory"));
      }
    } else if (rocksdb::Status status = env.CreateDirIfMissing(part); !status.ok()) {
      return FromRocksdbStatus(status, absl::StrCat(name, ": cannot make ", part));
    } else {
      RWKV_RETURN_IF_ERROR(SyncDirectory(env, ParentOf(part)));
    }
    if (slash == std::string::npos) return absl::OkStatus();
  }
}

absl::Status SyncDirectory(rocksdb::Env& env, const std::string& path) {
  std::unique_ptr<rocksdb::Directory> directory;
  rocksdb::Status status = env.NewDirectory(path, &directory);
  if (status.ok()) status = directory->Fsync();
  return FromRocksdbStatus(status, path);
}

}  // namespace rwkv::state_store
