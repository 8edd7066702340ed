#include "services/state_store/records/rocksdb/open_records.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "kernels/base/status_macros.h"
#include "rocksdb/iterator.h"
#include "rocksdb/sst_file_reader.h"
#include "rocksdb/write_batch.h"
#include "services/common/logging.h"
#include "services/state_store/client/crc32c.h"
#include "services/state_store/records/rocksdb/blob_files.h"
#include "services/state_store/records/rocksdb/record_rows.h"
#include "services/state_store/rocksdb/ack_journal.h"
#include "services/state_store/rocksdb/directories.h"
#include "services/state_store/rocksdb/layout.h"
#include "services/state_store/rocksdb/rocksdb_status.h"

namespace rwkv::state_store {
namespace {

struct Copied {
  int64_t records = 0;
  int64_t lost = 0;
  bool whole = true;  // All there are were looked at.
};

bool IsDamage(const rocksdb::Status& status) { return status.IsCorruption() || status.IsIOError(); }

using VisitInfo = absl::FunctionRef<absl::Status(const std::string& key, const std::string& info)>;

// The infos of records in the tables of a folder, one table after the other, so that none hides what others hold, and
// each from both ends. Some may be of records that were deleted.
absl::Status ForEachTableRow(rocksdb::Env& env, const std::string& folder, VisitInfo visit) {
  std::vector<std::string> names;
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(env.GetChildren(folder, &names), folder));
  rocksdb::Options options;
  options.env = &env;
  for (const std::string& name : names) {
    rocksdb::SstFileReader table(options);
    if (!absl::EndsWith(name, ".sst") || !table.Open(absl::StrCat(folder, "/", name)).ok()) continue;
    if (table.GetTableProperties()->column_family_name != FamilyName(Family::kRecordInfos)) continue;
    const std::unique_ptr<rocksdb::Iterator> it(table.NewIterator(rocksdb::ReadOptions()));
    std::string last;
    for (it->SeekToFirst(); it->Valid(); it->Next()) {
      last = it->key().ToString();
      RWKV_RETURN_IF_ERROR(visit(last, it->value().ToString()));
    }
    if (it->status().ok()) continue;
    for (it->SeekToLast(); it->Valid() && it->key().compare(last) > 0; it->Prev()) {
      RWKV_RETURN_IF_ERROR(visit(it->key().ToString(), it->value().ToString()));
    }
  }
  return absl::OkStatus();
}

// Copies record by record. `tolerant`: leaves out what cannot be read, and goes through the tables one by one when some
// info cannot; else that is an error.
absl::StatusOr<Copied> CopyRecords(Database& from, Database& to, bool tolerant) {
  Copied copied;
  RWKV_ASSIGN_OR_RETURN(const Database::Access source, from.Read());
  const auto copy = [&](const std::string& key, const std::string& info) -> absl::Status {
    std::string data;
    const absl::optional<RecordInfoRow> row = RecordInfoRow::Decode(info);
    if (row.has_value() && row->offset.has_value()) {  // Its bytes are in a file of their own.
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
  const std::unique_ptr<rocksdb::Iterator> it(
      source.db().NewIterator(rocksdb::ReadOptions(), source.family(Family::kRecordInfos)));
  for (it->SeekToFirst(); it->Valid(); it->Next()) {
    RWKV_RETURN_IF_ERROR(copy(it->key().ToString(), it->value().ToString()));
  }
  copied.whole = it->status().ok();
  if (!copied.whole && !(tolerant && IsDamage(it->status()))) return FromRocksdbStatus(it->status(), from.name());
  if (!copied.whole) RWKV_RETURN_IF_ERROR(ForEachTableRow(*from.env(), from.data_dir(), copy));
  RWKV_RETURN_IF_ERROR(to.Sync());
  return copied;
}

// What the blob files hold, whatever the list of files says. Records that were deleted come back, as nobody's, and are
// swept as such.
absl::Status CopyBlobs(rocksdb::Env& env, const std::string& folder, Database& to) {
  const auto copy = [&](absl::string_view key, absl::string_view value) -> absl::Status {
    if (!SnapshotOfRecord(key).has_value()) return absl::OkStatus();
    const RecordInfoRow row{value.size(), Crc32c(absl::MakeConstSpan(value.data(), value.size())), absl::Now(),
                            absl::nullopt};
    const rocksdb::Slice of(key.data(), key.size());
    RWKV_ASSIGN_OR_RETURN(Database::Access access, to.Read());
    rocksdb::WriteBatch batch;
    batch.Put(access.family(Family::kRecordInfos), of, row.Encode());
    batch.Put(access.family(Family::kRecords), of, rocksdb::Slice(value.data(), value.size()));
    return to.Write(std::move(access), batch, Durability::kBuffered);
  };
  std::vector<std::string> names;
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(env.GetChildren(folder, &names), folder));
  for (const std::string& name : names) {
    if (!absl::EndsWith(name, ".blob")) continue;
    RWKV_RETURN_IF_ERROR(ForEachBlob(env, absl::StrCat(folder, "/", name), copy));
  }
  return absl::OkStatus();
}

// How many infos of records there are, if all can be read. Their bytes are looked at when they are needed.
absl::StatusOr<int64_t> CountInfos(Database& database) {
  RWKV_ASSIGN_OR_RETURN(const Database::Access access, database.Read());
  int64_t infos = 0;
  const std::unique_ptr<rocksdb::Iterator> it(
      access.db().NewIterator(rocksdb::ReadOptions(), access.family(Family::kRecordInfos)));
  for (it->SeekToFirst(); it->Valid(); it->Next()) ++infos;
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(it->status(), database.name()));
  return infos;
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
//   records, damaged ──► scratch: a copy of it ──► saved: what can be read ──► records to aside ──► its files to saved
//     ──► saved to records
struct Rescue {
  explicit Rescue(const std::string& data_dir)
      : records(data_dir + "/records"),
        scratch(data_dir + "/records.scratch"),
        saved(data_dir + "/records.saved"),
        aside(data_dir + "/records.damaged-") {}

  std::string Aside(int n) const { return absl::StrCat(aside, n); }
  // The first that is free.
  int Next(rocksdb::Env& env) const {
    int n = 0;
    while (env.FileExists(Aside(n)).ok()) ++n;
    return n;
  }

  const std::string records, scratch, saved, aside;
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

// The files of a database, to try things on: RocksDB never writes to those that are links.
absl::Status CopyDatabase(rocksdb::Env& env, const std::string& from, const std::string& to) {
  RemoveFolder(env, to);
  RWKV_RETURN_IF_ERROR(MakeDirectories(env, to, "records"));
  std::vector<std::string> names;
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(env.GetChildren(from, &names), from));
  for (const std::string& name : names) {
    const std::string source = absl::StrCat(from, "/", name), target = absl::StrCat(to, "/", name);
    bool is_folder = false;
    if (name == "LOCK" || (env.IsDirectory(source, &is_folder).ok() && is_folder)) continue;
    const bool link = absl::EndsWith(name, ".sst") || absl::EndsWith(name, ".blob");
    if (link && env.LinkFile(source, target).ok()) continue;
    std::string content;
    if (!rocksdb::ReadFileToString(&env, source, &content).ok()) continue;  // That is damage, too.
    RWKV_RETURN_IF_ERROR(FromRocksdbStatus(rocksdb::WriteStringToFile(&env, content, target), target));
  }
  return absl::OkStatus();
}

// If CURRENT, which names the list of files, is damaged or gone, the newest list is meant: there is one, but while
// another is being written. Without any, nothing changes.
absl::Status PointAtManifest(rocksdb::Env& env, const std::string& folder) {
  std::string current;
  rocksdb::ReadFileToString(&env, folder + "/CURRENT", &current).PermitUncheckedError();
  std::vector<std::string> names;
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(env.GetChildren(folder, &names), folder));
  std::string newest;
  uint64_t newest_number = 0;
  for (const std::string& name : names) {
    uint64_t number = 0;
    if (!absl::StartsWith(name, "MANIFEST-") || !absl::SimpleAtoi(absl::StripPrefix(name, "MANIFEST-"), &number)) {
      continue;
    }
    if (current == name + "\n") return absl::OkStatus();
    if (number >= newest_number) newest = name;
    newest_number = std::max(number, newest_number);
  }
  if (newest.empty()) return absl::OkStatus();
  return FromRocksdbStatus(rocksdb::WriteStringToFile(&env, newest + "\n", folder + "/CURRENT"), folder);
}

// Opens a copy of damaged files as it is, as far as that goes.
absl::StatusOr<std::unique_ptr<Database>> OpenDamaged(Database::Options options, rocksdb::Env& env,
                                                      common::Metrics* metrics) {
  RWKV_RETURN_IF_ERROR(PointAtManifest(env, options.data_dir));
  absl::StatusOr<std::unique_ptr<Database>> database = Database::Open(options, metrics);
  // Without its list of files RocksDB would begin anew, and delete them.
  if (database.ok() || !AckJournal(&env, options.data_dir).CheckFiles(options.data_dir).ok()) return database;
  options.salvage = true;
  options.journal = false;
  return Database::Open(options, metrics);
}

// Opens a copy of damaged files with a list of those of its tables that are whole.
absl::StatusOr<std::unique_ptr<Database>> OpenRebuilt(Database::Options options, common::Metrics* metrics) {
  options.salvage = true;
  options.journal = false;
  RWKV_RETURN_IF_ERROR(Database::Rebuild(options));
  return Database::Open(options, metrics);
}

// Puts what can be read of the records in `folder` into `saved`. Returns how many there are now.
absl::StatusOr<int64_t> Save(const Database::Options& options, const Rescue& rescue, Database& saved,
                             common::Metrics* metrics) {
  rocksdb::Env& env = *saved.env();
  RWKV_RETURN_IF_ERROR(CopyBlobs(env, rescue.records, saved));
  Database::Options scratch = options;
  scratch.data_dir = rescue.scratch;
  bool whole = false;
  // What is damaged may keep RocksDB from reading what is not, until it is left out.
  for (const bool rebuild : {false, true}) {
    if (whole) break;
    RWKV_RETURN_IF_ERROR(CopyDatabase(env, rescue.records, rescue.scratch));
    const auto damaged = rebuild ? OpenRebuilt(scratch, metrics) : OpenDamaged(scratch, env, metrics);
    if (!damaged.ok()) continue;
    RWKV_ASSIGN_OR_RETURN(const Copied copied, CopyRecords(**damaged, saved, /*tolerant=*/true));
    whole = copied.whole;
  }
  RemoveFolder(env, rescue.scratch);
  return CountInfos(saved);
}

}  // namespace

absl::StatusOr<OpenedRecords> OpenRecords(const Database::Options& catalog, common::Metrics* metrics) {
  Database::Options options = catalog;
  options.data_dir = catalog.data_dir + "/records";
  options.metrics_labels = {{"database", "records"}};
  rocksdb::Env& env = options.env != nullptr ? *options.env : *rocksdb::Env::Default();
  const Rescue rescue(catalog.data_dir);
  OpenedRecords opened;
  if (env.FileExists(rescue.saved).ok()) {
    if (env.FileExists(rescue.records).ok()) {
      RemoveFolder(env, rescue.saved);  // It was still being filled.
    } else {
      RWKV_RETURN_IF_ERROR(PutInPlace(env, catalog.data_dir, rescue));
      opened.rescued = true;
    }
  }
  absl::StatusOr<std::unique_ptr<Database>> database = Database::Open(options, metrics);
  absl::Status damage = database.status();
  if (database.ok()) damage = CountInfos(**database).status();
  if (damage.ok()) {
    opened.database = *std::move(database);
    return opened;
  }
  // What is in use by another, or cannot be written, is not damaged; a file that is gone is.
  const bool writable =
      database.ok() || !absl::IsUnavailable(damage) || damage.message().find("No such file") != absl::string_view::npos;
  if (absl::IsResourceExhausted(damage) || !writable) return damage;
  database = damage;

  int64_t records = 0;
  {
    Database::Options to = options;
    to.data_dir = rescue.saved;
    RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<Database> saved, Database::Open(to, metrics));
    RWKV_ASSIGN_OR_RETURN(records, Save(options, rescue, *saved, metrics));
  }
  const std::string aside = rescue.Aside(rescue.Next(env));
  RWKV_RETURN_IF_ERROR(PutInPlace(env, catalog.data_dir, rescue));
  common::LogError("records_damaged", {{"error", damage},
                                       {"saved", records},
                                       {"damaged_files", aside},
                                       {"then", "states that are missing are made anew from the logs"}});
  opened.rescued = true;
  RWKV_ASSIGN_OR_RETURN(opened.database, Database::Open(options, metrics));
  return opened;
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
