#include "services/state_store/records/rocksdb/open_records.h"

#include <cstdint>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "rocksdb/iterator.h"
#include "rocksdb/write_batch.h"
#include "services/common/logging.h"
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

}  // namespace

absl::StatusOr<std::unique_ptr<Database>> OpenRecords(const Database::Options& catalog, common::Metrics* metrics) {
  Database::Options options = catalog;
  options.data_dir = catalog.data_dir + "/records";
  options.journal = false;
  options.metrics_labels = {{"database", "records"}};
  rocksdb::Env* const env = options.env != nullptr ? options.env : rocksdb::Env::Default();
  absl::StatusOr<std::unique_ptr<Database>> database = Database::Open(options, metrics);
  absl::Status damage = database.status();
  if (database.ok()) damage = ReadInfos(**database);
  // What is in use by another, or cannot be written, is not damaged; a file that is gone is.
  const bool writable =
      database.ok() || !absl::IsUnavailable(damage) || damage.message().find("No such file") != absl::string_view::npos;
  if (damage.ok() || absl::IsResourceExhausted(damage) || !writable) return database;
  database = damage;

  std::string aside;
  for (int n = 0; aside.empty() || env->FileExists(aside).ok(); ++n) {
    aside = absl::StrCat(catalog.data_dir, "/records.damaged-", n);
  }
  RWKV_RETURN_IF_ERROR(
      FromRocksdbStatus(env->RenameFile(options.data_dir, aside), absl::StrCat("cannot move ", options.data_dir)));
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<Database> fresh, Database::Open(options, metrics));
  if (const std::string files = aside + "/files"; env->FileExists(files).ok()) {
    RWKV_RETURN_IF_ERROR(
        FromRocksdbStatus(env->RenameFile(files, options.data_dir + "/files"), absl::StrCat("cannot move ", files)));
  }
  options.data_dir = aside;
  Copied copied;
  if (const auto damaged = Database::Open(options, metrics); damaged.ok()) {
    RWKV_ASSIGN_OR_RETURN(copied, CopyRecords(**damaged, *fresh, /*tolerant=*/true));
  }
  common::LogError("records_damaged", {{"error", damage},
                                       {"saved", copied.records},
                                       {"unreadable", copied.lost},
                                       {"damaged_files", aside},
                                       {"then", "states that are missing are made anew from the logs"}});
  return fresh;
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
