#include "services/state_store/offline/scratch.h"

#include <filesystem>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "rocksdb/env.h"
#include "rocksdb/options.h"
#include "rocksdb/sst_file_reader.h"
#include "services/state_store/rocksdb/kept_tables.h"

namespace rwkv::state_store {
namespace {

namespace fs = std::filesystem;

absl::Status CopyOne(const fs::path& from, const fs::path& to) {
  const std::string kind = to.extension().string();
  const bool link = kind == ".sst" || kind == ".blob" || kind == ".record";
  std::error_code failed;
  if (link) fs::create_hard_link(from, to, failed);
  if (!link || failed) fs::copy_file(from, to, failed);
  if (!failed) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("cannot copy ", from.string(), ": ", failed.message()));
}

absl::Status CopyFiles(const fs::path& from, const fs::path& to) {
  std::error_code failed;
  fs::create_directories(to, failed);
  for (const auto& entry : fs::directory_iterator(from, failed)) {
    const std::string name = entry.path().filename().string();
    if (entry.is_regular_file() && name != "LOCK") RWKV_RETURN_IF_ERROR(CopyOne(entry.path(), to / name));
  }
  if (failed) return absl::UnavailableError(absl::StrCat("cannot read ", from.string(), ": ", failed.message()));
  return absl::OkStatus();
}

}  // namespace

bool IsRepairBrokenOff(const std::string& data_dir) {
  return !fs::exists(data_dir + "/CURRENT") &&
         (fs::exists(data_dir + kRepairReady) || fs::exists(data_dir + kRepairMoving));
}

absl::StatusOr<std::unique_ptr<FolderLock>> FolderLock::Take(const std::string& data_dir) {
  std::error_code failed;
  if (!fs::is_directory(data_dir, failed) || fs::is_empty(data_dir, failed)) {
    return absl::NotFoundError(absl::StrCat("there is no state store in ", data_dir));
  }
  rocksdb::FileLock* lock = nullptr;
  if (const rocksdb::Status status = rocksdb::Env::Default()->LockFile(data_dir + "/LOCK", &lock); !status.ok()) {
    return absl::UnavailableError(
        absl::StrCat("state store in ", data_dir, ": stop it first (", status.ToString(), ")"));
  }
  return std::unique_ptr<FolderLock>(new FolderLock(lock));
}

FolderLock::~FolderLock() { rocksdb::Env::Default()->UnlockFile(lock_).PermitUncheckedError(); }

absl::StatusOr<std::string> CopyToScratch(const std::string& data_dir) {
  if (IsRepairBrokenOff(data_dir)) {
    return absl::FailedPreconditionError(absl::StrCat(
        "a repair of the state store in ", data_dir, " was broken off: `rwkvctl store repair ", data_dir, "` ends it"));
  }
  if (fs::exists(data_dir + "/records.saved") && !fs::exists(data_dir + "/records")) {
    return absl::FailedPreconditionError(
        absl::StrCat("the state store in ", data_dir, " was ended while it put saved states in place: start it once"));
  }
  const std::string scratch = data_dir + "/.survey";
  std::error_code failed;
  fs::remove_all(scratch, failed);
  absl::Status copied = CopyFiles(data_dir, scratch);
  for (const std::string& folder : {std::string(kKeptTables), std::string("/records"), std::string("/records/files")}) {
    if (copied.ok() && fs::is_directory(data_dir + folder)) copied = CopyFiles(data_dir + folder, scratch + folder);
  }
  RWKV_RETURN_IF_ERROR(copied);
  return scratch;
}

int64_t CountLostTables(const std::string& scratch) {
  int64_t tables = 0;
  for (const std::string& folder : {scratch, scratch + "/lost"}) {  // The second is Database::Rebuild's.
    std::error_code none;
    for (const auto& entry : fs::directory_iterator(folder, none)) {
      if (entry.path().extension() != ".sst") continue;
      tables += rocksdb::SstFileReader(rocksdb::Options()).Open(entry.path().string()).ok() ? 0 : 1;
    }
  }
  return tables;
}

bool HasKeptTables(const std::string& scratch) { return fs::is_directory(scratch + kKeptTables); }

absl::StatusOr<std::unique_ptr<Database>> OpenAllTables(const std::string& scratch, common::Metrics* metrics) {
  Database::Options options;
  options.data_dir = scratch + "/all";
  options.journal = false;
  options.salvage = true;
  options.compacts = false;
  std::error_code failed;
  fs::create_directories(options.data_dir, failed);
  // No number is given to two tables: RocksDB goes on behind the greatest that it finds in its folder.
  for (const std::string& folder : {scratch, scratch + kKeptTables}) {
    for (const auto& entry : fs::directory_iterator(folder, failed)) {
      const fs::path to = fs::path(options.data_dir) / entry.path().filename();
      rocksdb::SstFileReader table((rocksdb::Options()));
      if (entry.path().extension() != ".sst" || fs::exists(to)) continue;
      if (!table.Open(entry.path().string()).ok() || !table.VerifyChecksum().ok()) continue;
      RWKV_RETURN_IF_ERROR(CopyOne(entry.path(), to));
    }
  }
  RWKV_RETURN_IF_ERROR(Database::Rebuild(options));
  return Database::Open(options, metrics);
}

absl::StatusOr<std::unique_ptr<Database>> OpenScratch(const std::string& scratch, common::Metrics* metrics,
                                                      std::string* why) {
  Database::Options options;
  options.data_dir = scratch;
  options.compacts = false;
  absl::StatusOr<std::unique_ptr<Database>> database = Database::Open(options, metrics);
  if (database.ok()) return database;
  *why = std::string(database.status().message());
  // What the log has before and behind the damage.
  const bool files_are_known = AckJournal(rocksdb::Env::Default(), scratch).CheckFiles(scratch).ok();
  options.journal = false;
  options.salvage = true;
  if (files_are_known) database = Database::Open(options, metrics);
  if (database.ok()) return database;
  // The tables that are there, whatever the list of files says.
  RWKV_RETURN_IF_ERROR(Database::Rebuild(options));
  return Database::Open(options, metrics);
}

}  // namespace rwkv::state_store
