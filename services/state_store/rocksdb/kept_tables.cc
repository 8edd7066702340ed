#include "services/state_store/rocksdb/kept_tables.h"

#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/common/logging.h"
#include "services/state_store/rocksdb/directories.h"
#include "services/state_store/rocksdb/rocksdb_status.h"

namespace rwkv::state_store {
namespace {

absl::Status Keep(rocksdb::Env& env, const std::string& data_dir) {
  const std::string kept = data_dir + kKeptTables;
  RWKV_RETURN_IF_ERROR(MakeDirectories(env, kept, data_dir));
  std::vector<std::string> names;
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(env.GetChildren(data_dir, &names), data_dir));
  for (const std::string& name : names) {
    const std::string link = absl::StrCat(kept, "/", name);
    if (!absl::EndsWith(name, ".sst") || env.FileExists(link).ok()) continue;
    RWKV_RETURN_IF_ERROR(FromRocksdbStatus(env.LinkFile(absl::StrCat(data_dir, "/", name), link), link));
  }
  return SyncDirectory(env, kept);
}

}  // namespace

void KeepTables(rocksdb::Env& env, const std::string& data_dir) {
  if (const absl::Status status = Keep(env, data_dir); !status.ok()) {
    common::LogWarning("tables_not_kept", {{"data_dir", data_dir}, {"error", status}});
  }
}

void DropKeptTables(rocksdb::Env& env, const std::string& data_dir) {
  const std::string kept = data_dir + kKeptTables;
  std::vector<std::string> names;
  if (!env.GetChildren(kept, &names).ok()) return;
  for (const std::string& name : names) env.DeleteFile(absl::StrCat(kept, "/", name)).PermitUncheckedError();
  env.DeleteDir(kept).PermitUncheckedError();
}

}  // namespace rwkv::state_store
