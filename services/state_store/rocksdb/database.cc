#include "services/state_store/rocksdb/database.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "kernels/base/status_macros.h"
#include "rocksdb/cache.h"
#include "rocksdb/convenience.h"
#include "rocksdb/filter_policy.h"
#include "rocksdb/table.h"
#include "services/common/logging.h"
#include "services/state_store/rocksdb/reclaim.h"
#include "services/state_store/rocksdb/rocksdb_status.h"

namespace rwkv::state_store {
namespace {

constexpr char kFormatKey[] = "format_version";
constexpr char kFormatVersion[] = "1";
constexpr char kProbeKey[] = "probe";    // Written for the sake of writing; holds nothing.
constexpr size_t kProbeBytes = 1 << 20;  // A disk with less than that to spare is full.
constexpr char kFailuresName[] = "rwkv_state_store_write_failures_total";
constexpr char kFailuresHelp[] = "Writes that failed, by cause.";

rocksdb::ColumnFamilyOptions FamilyOptions(Family family, const std::shared_ptr<rocksdb::Cache>& block_cache) {
  rocksdb::ColumnFamilyOptions options;
  rocksdb::BlockBasedTableOptions table;
  table.block_cache = block_cache;
  table.filter_policy.reset(rocksdb::NewBloomFilterPolicy(10));
  options.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  options.write_buffer_size = 16 << 20;
  // fp32 states do not compress, and the catalog is small: speed and few dependencies over space.
  options.compression = rocksdb::kNoCompression;
  if (family == Family::kRecords) {
    options.write_buffer_size = 64 << 20;
    options.enable_blob_files = true;
    options.min_blob_size = 4 << 10;
    options.blob_compression_type = rocksdb::kNoCompression;
    // Records die young (retention keeps a few per branch), so old blob files are mostly garbage: rewrite them when
    // half of the oldest ones is.
    options.enable_blob_garbage_collection = true;
    options.blob_garbage_collection_age_cutoff = 1.0;
    options.blob_garbage_collection_force_threshold = 0.5;
  }
  return options;
}

std::string FamilyName(Family family) {
  switch (family) {
    case Family::kMeta:
      return rocksdb::kDefaultColumnFamilyName;
    case Family::kCatalog:
      return "catalog";
    case Family::kRecordInfos:
      return "record_infos";
    case Family::kRecords:
      return "records";
  }
  return "";
}

// Makes `path` and its parents.
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
    }
    if (slash == std::string::npos) return absl::OkStatus();
  }
}

// Whether a file can be written and fsynced. At start RocksDB would find out too, but only in the middle of its
// recovery and with a message to match; later this tells whether it is worth disturbing RocksDB.
absl::Status CheckWritable(rocksdb::Env& env, const std::string& data_dir, const std::string& name) {
  const std::string path = data_dir + "/.writable";
  std::unique_ptr<rocksdb::WritableFile> file;
  rocksdb::Status status = env.NewWritableFile(path, &file, rocksdb::EnvOptions());
  if (status.ok()) status = file->Append(std::string(kProbeBytes, '\0'));
  if (status.ok()) status = file->Sync();
  if (status.ok()) status = file->Close();
  file.reset();
  env.DeleteFile(path).PermitUncheckedError();
  return FromRocksdbStatus(status, absl::StrCat(name, ": not writable"));
}

}  // namespace

Database::Database(const Options& options, common::Metrics* metrics)
    : options_(options),
      name_(absl::StrCat("state store in ", options.data_dir)),
      env_(options.env != nullptr ? options.env : rocksdb::Env::Default()),
      statistics_(rocksdb::CreateDBStatistics()),
      block_cache_(rocksdb::NewLRUCache(64 << 20)),
      commit_seconds_(metrics->Histogram("rwkv_state_store_commit_seconds",
                                         "Time of one durable write, from the call to its fsync.",
                                         common::Metrics::LatencyBuckets())),
      commits_total_(metrics->Counter("rwkv_state_store_commits_total", "Durable writes.")),
      wal_syncs_total_(metrics->Counter("rwkv_state_store_wal_syncs_total",
                                        "Fsyncs of the write-ahead log; commits per sync is the group size.")),
      no_space_total_(metrics->Counter(kFailuresName, kFailuresHelp, {{"cause", "no_space"}})),
      io_errors_total_(metrics->Counter(kFailuresName, kFailuresHelp, {{"cause", "io"}})),
      corruptions_total_(metrics->Counter(kFailuresName, kFailuresHelp, {{"cause", "corruption"}})),
      resumes_total_(metrics->Counter("rwkv_state_store_resumes_total", "Times that writing went on after failures.")),
      reclaimed_bytes_total_(metrics->Counter("rwkv_state_store_reclaimed_bytes_total",
                                              "Bytes of files that were given back to the disk after deletions.")),
      writable_(metrics->Gauge("rwkv_state_store_writable", "1 while the database takes writes, 0 while it cannot.")) {
  statistics_->set_stats_level(rocksdb::kExceptHistogramOrTimers);
}

Database::~Database() {
  absl::MutexLock lock(&db_mu_);
  CloseDb();
}

absl::StatusOr<std::unique_ptr<Database>> Database::Open(const Options& options, common::Metrics* metrics) {
  if (options.data_dir.empty()) return absl::InvalidArgumentError("data_dir is empty: name a folder for the database");
  std::unique_ptr<Database> database(new Database(options, metrics));
  RWKV_RETURN_IF_ERROR(MakeDirectories(*database->env_, options.data_dir, database->name_));
  RWKV_RETURN_IF_ERROR(CheckWritable(*database->env_, options.data_dir, database->name_));
  {
    absl::MutexLock lock(&database->db_mu_);
    RWKV_RETURN_IF_ERROR(database->OpenDb());
  }
  RWKV_RETURN_IF_ERROR(database->CheckFormat());
  database->writable_.Set(1);
  return database;
}

absl::Status Database::OpenDb() {
  rocksdb::DBOptions options;
  options.env = env_;
  options.create_if_missing = true;
  options.create_missing_column_families = true;
  options.paranoid_checks = true;
  // What was fsynced is whole, so damage before the tail is damage, and must not pass for the end of the log.
  options.wal_recovery_mode = rocksdb::WALRecoveryMode::kTolerateCorruptedTailRecords;
  options.max_total_wal_size = uint64_t{256} << 20;
  // Records go through the log too. Written out as they come, they do not pile up in front of the next fsync, which
  // some token waits for.
  options.wal_bytes_per_sync = 1 << 20;
  options.bytes_per_sync = 1 << 20;
  options.max_background_jobs = 2;
  options.max_open_files = 1024;
  options.keep_log_file_num = 4;
  options.max_log_file_size = 4 << 20;
  options.info_log_level = rocksdb::WARN_LEVEL;
  options.statistics = statistics_;
  // Resuming is up to us (TryResume), so that no thread of RocksDB's retries on its own for hours.
  options.max_bgerror_resume_count = 0;

  std::vector<rocksdb::ColumnFamilyDescriptor> descriptors;
  for (int i = 0; i < kFamilyCount; ++i) {
    const Family family = static_cast<Family>(i);
    descriptors.emplace_back(FamilyName(family), FamilyOptions(family, block_cache_));
  }
  rocksdb::DB* db = nullptr;
  const rocksdb::Status status = rocksdb::DB::Open(options, options_.data_dir, descriptors, &families_, &db);
  if (!status.ok()) {
    families_.clear();
    const std::string text = status.ToString();
    if (status.IsIOError() && absl::StrContains(text, "lock")) {
      return absl::UnavailableError(absl::StrCat(name_, ": in use by another process (", text, ")"));
    }
    if (status.IsInvalidArgument() && absl::StrContains(text, "olumn famil")) {
      return absl::FailedPreconditionError(absl::StrCat(name_, ": of a newer format (", text, ")"));
    }
    return FromRocksdbStatus(status, status.IsCorruption() ? absl::StrCat(name_, ": corrupt") : name_);
  }
  db_.reset(db);
  ++opening_;
  return absl::OkStatus();
}

void Database::CloseDb() {
  if (db_ == nullptr) return;
  for (rocksdb::ColumnFamilyHandle* family : families_) db_->DestroyColumnFamilyHandle(family).PermitUncheckedError();
  families_.clear();
  if (const rocksdb::Status status = db_->Close(); !status.ok()) {
    common::LogWarning("database_close_failed", {{"data_dir", options_.data_dir}, {"error", status.ToString()}});
  }
  db_.reset();
}

absl::Status Database::CheckFormat() {
  std::string version;
  rocksdb::Status status;
  {
    RWKV_ASSIGN_OR_RETURN(const Access access, Read());
    status = access.db().Get(rocksdb::ReadOptions(), access.family(Family::kMeta), kFormatKey, &version);
  }
  if (status.IsNotFound()) {
    rocksdb::WriteBatch batch;
    RWKV_ASSIGN_OR_RETURN(Access access, Read());
    batch.Put(access.family(Family::kMeta), kFormatKey, kFormatVersion).PermitUncheckedError();
    return Write(std::move(access), batch, Durability::kSynced);
  }
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(status, name_));
  if (version != kFormatVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat(name_, ": format ", version, ", while this build reads format ", kFormatVersion));
  }
  return absl::OkStatus();
}

absl::optional<Database::Access> Database::TryRead() {
  Access access;
  access.lock_ = std::make_unique<absl::ReaderMutexLock>(&db_mu_);
  db_mu_.AssertReaderHeld();
  if (db_ == nullptr) return absl::nullopt;
  access.db_ = db_.get();
  access.families_ = families_.data();
  access.opening_ = opening_;
  return access;
}

absl::StatusOr<Database::Access> Database::Read() {
  const absl::Status resumed = TryResume();
  if (absl::optional<Access> access = TryRead(); access.has_value()) return *std::move(access);
  return resumed.ok() ? absl::UnavailableError(absl::StrCat(name_, ": closed")) : resumed;
}

absl::Status Database::Write(Access access, rocksdb::WriteBatch& batch, Durability durability) {
  if (stopped_.load(std::memory_order_acquire)) {
    absl::MutexLock lock(&error_mu_);
    return error_;
  }
  rocksdb::WriteOptions options;
  options.sync = durability == Durability::kSynced;
  const absl::Time start = absl::Now();
  const rocksdb::Status status = access.db().Write(options, &batch);
  access = Access();
  if (!status.ok()) return Failed(status);
  if (options.sync) {
    commit_seconds_.Observe(std::max(0.0, absl::ToDoubleSeconds(absl::Now() - start)));
    commits_total_.Increment();
    synced_writes_.fetch_add(1, std::memory_order_relaxed);
    CountSyncs();
  }
  return absl::OkStatus();
}

absl::Status Database::Sync() {
  // The log is one sequence, so a synced write brings with it all that came before; and unlike a SyncWAL() it shares
  // its fsync with other writers.
  RWKV_ASSIGN_OR_RETURN(Access access, Read());
  rocksdb::WriteBatch batch;
  batch.Put(access.family(Family::kMeta), kProbeKey, "");
  return Write(std::move(access), batch, Durability::kSynced);
}

absl::Status Database::Reclaim() {
  RWKV_ASSIGN_OR_RETURN(const Access access, Read());
  cancel_reclaim_ = false;
  if (closing_ || stopped_) return absl::CancelledError(absl::StrCat(name_, ": not now"));
  const auto file_bytes = [&] {
    uint64_t bytes = 0;
    for (int i = 0; i < kFamilyCount; ++i) {
      for (const std::string& name :
           {rocksdb::DB::Properties::kTotalSstFilesSize, rocksdb::DB::Properties::kTotalBlobFileSize}) {
        uint64_t value = 0;
        access.db().GetIntProperty(access.family(static_cast<Family>(i)), name, &value);
        bytes += value;
      }
    }
    return bytes;
  };
  const uint64_t before = file_bytes();
  RWKV_RETURN_IF_ERROR(
      ReclaimSpace(access.db(), absl::MakeConstSpan(access.families_, kFamilyCount), &cancel_reclaim_));
  const uint64_t after = file_bytes();
  if (after < before) reclaimed_bytes_total_.Increment(static_cast<double>(before - after));
  return absl::OkStatus();
}

uint64_t Database::wal_syncs() const { return statistics_->getTickerCount(rocksdb::WAL_FILE_SYNCED); }

void Database::CountSyncs() {
  const uint64_t now = wal_syncs();
  uint64_t counted = counted_syncs_.load(std::memory_order_relaxed);
  while (counted < now && !counted_syncs_.compare_exchange_weak(counted, now, std::memory_order_relaxed)) {
  }
  if (counted < now) wal_syncs_total_.Increment(static_cast<double>(now - counted));
}

absl::Status Database::Failed(const rocksdb::Status& status) {
  const absl::Status error = FromRocksdbStatus(status, absl::StrCat(name_, ": write failed"));
  (absl::IsResourceExhausted(error) ? no_space_total_
   : absl::IsDataLoss(error)        ? corruptions_total_
                                    : io_errors_total_)
      .Increment();
  // A write that asks for the impossible is our own bug, and stops nobody else.
  if (absl::IsInternal(error)) return error;
  {
    absl::MutexLock lock(&error_mu_);
    error_ = error;
  }
  if (!stopped_.exchange(true, std::memory_order_acq_rel)) {
    cancel_reclaim_ = true;  // Opening the files again has to wait for it.
    writable_.Set(0);
    common::LogError("writes_stopped", {{"data_dir", options_.data_dir}, {"error", error}});
  }
  return error;
}

absl::Status Database::TryResume() {
  if (!stopped_.load(std::memory_order_acquire)) return absl::OkStatus();
  if (resume_mu_.TryLock()) {
    if (stopped_.load(std::memory_order_acquire) && absl::Now() - last_resume_ >= options_.resume_interval) {
      const absl::Status status = Resume();
      last_resume_ = absl::Now();
      if (status.ok()) {
        stopped_.store(false, std::memory_order_release);
        writable_.Set(1);
        resumes_total_.Increment();
        common::LogInfo("writes_resumed", {{"data_dir", options_.data_dir}});
      } else {
        absl::MutexLock lock(&error_mu_);
        error_ = status;
      }
    }
    resume_mu_.Unlock();
  }
  if (!stopped_.load(std::memory_order_acquire)) return absl::OkStatus();
  absl::MutexLock lock(&error_mu_);
  return error_;
}

absl::Status Database::Resume() {
  RWKV_RETURN_IF_ERROR(CheckWritable(*env_, options_.data_dir, name_));
  {
    absl::ReaderMutexLock lock(&db_mu_);
    if (db_ != nullptr && db_->Resume().ok()) {
      // It may have found nothing to do although the last write failed: only a write proves that writing works.
      rocksdb::WriteOptions options;
      options.sync = true;
      if (db_->Put(options, families_[static_cast<size_t>(Family::kMeta)], kProbeKey, "").ok()) return absl::OkStatus();
    }
  }
  // RocksDB takes some errors for final, such as a failed fsync of the log. What it acknowledged is in the files, so
  // opening them again is a clean start.
  absl::MutexLock lock(&db_mu_);
  CloseDb();
  return OpenDb();
}

}  // namespace rwkv::state_store
