#include "services/state_store/records/rocksdb/open_records.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "rocksdb/iterator.h"
#include "rocksdb/write_batch.h"
#include "services/common/logging.h"
#include "services/state_store/rocksdb/directories.h"
#include "services/state_store/rocksdb/rocksdb_status.h"

namespace rwkv::state_store {
namespace {

constexpr size_t kInfoBytesWithFile = 32;  // rocksdb_record_store.cc

struct Copied {
  int64_t records = 0;
  int64_t lost = 0;
};

bool IsDamage(const rocksdb::Status& status) { return status.IsCorruption() || status.IsIOError(); }

// Copies record by record. `tolerant`: leaves out what cannot be read, and goes on from the other end when an info
// cannot; else that is an error.
absl::StatusOr<Copied> CopyRecords(Database& from, Database& to, bool tolerant) {
  Copied copied;
  RWKV_ASSIGN_OR_RETURN(const Database::Access source, from.Read());
  const auto copy = [&](const std::string& key, const std::string& info) -> absl::Status {
    std::string data;
    if (info.size() == kInfoBytesWithFile) {  // Its bytes are in a file of their own.
      RWKV_ASSIGN_OR_RETURN(Database::Access access, to.Read());
      rocksdb::WriteBatch batch;
      batch.Put(access.family(Family::kRecordInfos), key, info);
      ++copied.records;
      return to.Write(std::move(access), batch, Durability::kBuffered);
    }
    rocksdb::ReadOptions options;
    options.fill_cache = false;
    const rocksdb::Status status = source.db().Get(options, source.family(Family::kRecords), key, &data);
    if (tolerant && (IsDamage(status) || status.IsNotFound())) {
      ++copied.lost;
      return absl::OkStatus();
    }
    RWKV_RETURN_IF_ERROR(FromRocksdbStatus(status, from.name()));
    RWKV_ASSIGN_OR_RETURN(Database::Access access, to.Read());
    rocksdb::WriteBatch batch;
    batch.Put(access.family(Family::kRecordInfos), key, info);
    batch.Put(access.family(Family::kRecords), key, data);
    ++copied.records;
    return to.Write(std::move(access), batch, Durability::kBuffered);
  };
  std::string first_bad;  // Where the way forward ended.
  const std::unique_ptr<rocksdb::Iterator> it(
      source.db().NewIterator(rocksdb::ReadOptions(), source.family(Family::kRecordInfos)));
  for (it->SeekToFirst(); it->Valid(); it->Next()) {
    first_bad = it->key().ToString() + '\0';
    RWKV_RETURN_IF_ERROR(copy(it->key().ToString(), it->value().ToString()));
  }
  if (!it->status().ok() && !(tolerant && IsDamage(it->status()))) {
    return FromRocksdbStatus(it->status(), from.name());
  }
  if (!it->status().ok()) {
    for (it->SeekToLast(); it->Valid() && it->key().compare(first_bad) >= 0; it->Prev()) {
      RWKV_RETURN_IF_ERROR(copy(it->key().ToString(), it->value().ToString()));
    }
  }
  RWKV_RETURN_IF_ERROR(to.Sync());
  return copied;
}

// Whether all infos of records can be read. Their bytes are looked at when they are needed.
absl::Status ReadInfos(Database& database) {
  RWKV_ASSIGN_OR_RETURN(const Database::Access access, database.Read());
  const std::unique_ptr<rocksdb::Iterator> it(
      access.db().NewIterator(rocksdb::ReadOptions(), access.family(Family::kRecordInfos)));
  for (it->SeekToFirst(); it->Valid(); it->Next()) {
  }
  return FromRocksdbStatus(it->status(), database.name());
}

absl::Status Rename(rocksdb::Env& env, const std::string& from, const std::string& to) {
  return FromRocksdbStatus(env.RenameFile(from, to), absl::StrCat("cannot move ", from));
}

// A folder without folders in it.
void RemoveFolder(rocksdb::Env& env, const std::string& path) {
  std::vector<std::string> names;
  env.GetChildren(path, &names).PermitUncheckedError();
  for (const std::string& name : names) env.DeleteFile(path + "/" + name).PermitUncheckedError();
  env.DeleteDir(path).PermitUncheckedError();
}

// The folders of a rescue. It may be broken off anywhere, and goes on at the next start:
//   records, damaged ──► saved: what can be read ──► records to aside ──► its files to saved ──► saved to records
struct Rescue {
  explicit Rescue(const std::string& data_dir)
      : records(data_dir + "/records"), saved(data_dir + "/records.saved"), aside(data_dir + "/records.damaged-") {}

  std::string Aside(int n) const { return absl::StrCat(aside, n); }
  // The first that is free.
  int Next(rocksdb::Env& env) const {
    int n = 0;
    while (env.FileExists(Aside(n)).ok()) ++n;
    return n;
  }

  const std::string records, saved, aside;
};

// What follows on saving.
absl::Status PutInPlace(rocksdb::Env& env, const std::string& data_dir, const Rescue& rescue) {
  if (env.FileExists(rescue.records).ok()) {
    RWKV_RETURN_IF_ERROR(Rename(env, rescue.records, rescue.Aside(rescue.Next(env))));
    RWKV_RETURN_IF_ERROR(SyncDirectory(env, data_dir));
  }
  const std::string aside = rescue.Aside(rescue.Next(env) - 1);
  if (env.FileExists(aside + "/files").ok()) {
    RWKV_RETURN_IF_ERROR(Rename(env, aside + "/files", rescue.saved + "/files"));
    RWKV_RETURN_IF_ERROR(SyncDirectory(env, rescue.saved));
  }
  RWKV_RETURN_IF_ERROR(Rename(env, rescue.saved, rescue.records));
  return SyncDirectory(env, data_dir);
}

// Opens damaged files by whatever means. What it cannot read may be gone afterwards.
absl::StatusOr<std::unique_ptr<Database>> OpenDamaged(Database::Options options, common::Metrics* metrics) {
  absl::StatusOr<std::unique_ptr<Database>> database = Database::Open(options, metrics);
  if (database.ok()) return database;
  options.salvage = true;
  database = Database::Open(options, metrics);
  if (database.ok()) return database;
  RWKV_RETURN_IF_ERROR(Database::Rebuild(options));
  return Database::Open(options, metrics);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Database>> OpenRecords(const Database::Options& catalog, common::Metrics* metrics) {
  Database::Options options = catalog;
  options.data_dir = catalog.data_dir + "/records";
  options.journal = false;
  options.metrics_labels = {{"database", "records"}};
  rocksdb::Env& env = options.env != nullptr ? *options.env : *rocksdb::Env::Default();
  const Rescue rescue(catalog.data_dir);
  if (env.FileExists(rescue.saved).ok()) {
    if (env.FileExists(rescue.records).ok()) {
      RemoveFolder(env, rescue.saved);  // It was still being filled.
    } else {
      RWKV_RETURN_IF_ERROR(PutInPlace(env, catalog.data_dir, rescue));
    }
  }
  absl::StatusOr<std::unique_ptr<Database>> database = Database::Open(options, metrics);
  absl::Status damage = database.status();
  if (database.ok()) damage = ReadInfos(**database);
  // What is in use by another, or cannot be written, is not damaged; a file that is gone is.
  const bool writable =
      database.ok() || !absl::IsUnavailable(damage) || damage.message().find("No such file") != absl::string_view::npos;
  if (damage.ok() || absl::IsResourceExhausted(damage) || !writable) return database;
  database = damage;

  Copied copied;
  {
    Database::Options to = options;
    to.data_dir = rescue.saved;
    RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<Database> saved, Database::Open(to, metrics));
    if (const auto damaged = OpenDamaged(options, metrics); damaged.ok()) {
      RWKV_ASSIGN_OR_RETURN(copied, CopyRecords(**damaged, *saved, /*tolerant=*/true));
    }
  }
  const std::string aside = rescue.Aside(rescue.Next(env));
  RWKV_RETURN_IF_ERROR(PutInPlace(env, catalog.data_dir, rescue));
  common::LogError("records_damaged", {{"error", damage},
                                       {"saved", copied.records},
                                       {"unreadable", copied.lost},
                                       {"damaged_files", aside},
                                       {"then", "states that are missing are made anew from the logs"}});
  return Database::Open(options, metrics);
}

absl::Status MoveRecords(Database& from, Database& to) {
  {
    RWKV_ASSIGN_OR_RETURN(const Database::Access access, from.Read());
    const std::unique_ptr<rocksdb::Iterator> it(
        access.db().NewIterator(rocksdb::ReadOptions(), access.family(Family::kRecordInfos)));
    it->SeekToFirst();
    if (!it->Valid() && it->status().ok()) return absl::OkStatus();
  }
  RWKV_ASSIGN_OR_RETURN(const Copied copied, CopyRecords(from, to, /*tolerant=*/true));
  RWKV_ASSIGN_OR_RETURN(Database::Access access, from.Read());
  rocksdb::WriteBatch batch;
  for (const Family family : {Family::kRecordInfos, Family::kRecords}) {
    batch.DeleteRange(access.family(family), "", "\x7f\x7f");  // Ids are ASCII.
  }
  RWKV_RETURN_IF_ERROR(from.Write(std::move(access), batch, Durability::kSynced));
  common::LogInfo("records_moved",
                  {{"from", from.name()}, {"to", to.name()}, {"records", copied.records}, {"unreadable", copied.lost}});
  return absl::OkStatus();
}

}  // namespace rwkv::state_store
