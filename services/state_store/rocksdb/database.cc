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
#include "services/common/logging.h"
#include "services/state_store/rocksdb/directories.h"
#include "services/state_store/rocksdb/kept_tables.h"
#include "services/state_store/rocksdb/layout.h"
#include "services/state_store/rocksdb/reclaim.h"
#include "services/state_store/rocksdb/rocksdb_status.h"
#include "services/state_store/rows/sealed_value.h"

namespace rwkv::state_store {
namespace {

constexpr char kFormatKey[] = "format_version";
constexpr char kFormatVersion[] = "2";
constexpr char kFormerFormatVersion[] = "1";
constexpr char kProbeKey[] = "probe";  // Written for the sake of writing; holds nothing.
constexpr char kFailuresName[] = "rwkv_state_store_write_failures_total";
constexpr char kFailuresHelp[] = "Writes that failed, by cause.";

// The changes of a family's rows in a batch.
std::vector<JournalEdit> EditsOf(const rocksdb::WriteBatch& batch, uint32_t family) {
  struct Collector : rocksdb::WriteBatch::Handler {
    using Slice = rocksdb::Slice;
    rocksdb::Status Add(uint32_t of, JournalEdit edit) {
      if (of == family) edits.push_back(std::move(edit));
      return rocksdb::Status::OK();
    }
    rocksdb::Status PutCF(uint32_t of, const Slice& key, const Slice& value) override {
      const uint32_t seal = of == family ? SealOf(absl::string_view(value.data(), value.size())) : 0;
      return Add(of, {JournalEdit::Kind::kPut, key.ToString(), "", seal});
    }
    rocksdb::Status DeleteCF(uint32_t of, const Slice& key) override {
      return Add(of, {JournalEdit::Kind::kDelete, key.ToString(), "", 0});
    }
    rocksdb::Status DeleteRangeCF(uint32_t of, const Slice& begin, const Slice& end) override {
      return Add(of, {JournalEdit::Kind::kDeleteRange, begin.ToString(), end.ToString(), 0});
    }
    uint32_t family = 0;
    std::vector<JournalEdit> edits;
  } collector;
  collector.family = family;
  batch.Iterate(&collector).PermitUncheckedError();
  return std::move(collector.edits);
}

}  // namespace

Database::Database(const Options& options, common::Metrics* metrics)
    : options_(options),
      name_(absl::StrCat("state store in ", options.data_dir)),
      env_(options.env != nullptr ? options.env : rocksdb::Env::Default()),
      statistics_(rocksdb::CreateDBStatistics()),
      block_cache_(rocksdb::NewLRUCache(64 << 20)),
      journal_(options.journal ? std::make_unique<AckJournal>(env_, options.data_dir) : nullptr),
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
      writable_(metrics->Gauge("rwkv_state_store_writable", "1 while the database takes writes, 0 while it cannot.",
                               options.metrics_labels)) {
  statistics_->set_stats_level(rocksdb::kExceptHistogramOrTimers);
}

Database::~Database() {
  // A store that was stopped has nothing in its write-ahead log, which could be cut without anybody noticing.
  absl::MutexLock lock(&db_mu_);
  const bool flushed = db_ != nullptr && !stopped_ && lost_rows_.empty() && db_->Flush({}, families_).ok();
  if (flushed && journal_ != nullptr && journal_->Rotate().ok()) {
    journal_->DropOlder();
    if (log_is_trusted_) journal_->NoteWritten(db_->GetLatestSequenceNumber(), /*closed=*/true);
  }
  CloseDb();
}

absl::StatusOr<std::unique_ptr<Database>> Database::Open(const Options& options, common::Metrics* metrics) {
  if (options.data_dir.empty()) return absl::InvalidArgumentError("data_dir is empty: name a folder for the database");
  std::unique_ptr<Database> database(new Database(options, metrics));
  RWKV_RETURN_IF_ERROR(MakeDirectories(*database->env_, options.data_dir, database->name_));
  RWKV_RETURN_IF_ERROR(CheckWritable(*database->env_, options.data_dir, database->name_));
  if (!options.salvage) {
    RWKV_RETURN_IF_ERROR(AckJournal(database->env_, options.data_dir).CheckFiles(database->name_));
  }
  AcknowledgedRows acknowledged;
  if (database->journal_ != nullptr) acknowledged = database->journal_->Read();
  if (!acknowledged.rows.empty()) KeepTables(*database->env_, options.data_dir);
  {
    absl::MutexLock lock(&database->db_mu_);
    RWKV_RETURN_IF_ERROR(database->OpenDb());
  }
  RWKV_RETURN_IF_ERROR(database->CheckFormat());
  RWKV_RETURN_IF_ERROR(database->CheckJournal(acknowledged));
  database->writable_.Set(1);
  return database;
}

absl::Status Database::OpenDb() {
  rocksdb::DBOptions options;
  options.env = env_;
  options.create_if_missing = true;
  options.create_missing_column_families = true;
  options.paranoid_checks = !options_.salvage;
  // What was fsynced is whole, so damage before the tail is damage, and must not pass for the end of the log.
  options.wal_recovery_mode = options_.salvage ? rocksdb::WALRecoveryMode::kSkipAnyCorruptedRecords
                                               : rocksdb::WALRecoveryMode::kTolerateCorruptedTailRecords;
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
    descriptors.back().options.disable_auto_compactions = !options_.compacts;
  }
  std::vector<std::string> names;
  rocksdb::DB::ListColumnFamilies(options, options_.data_dir, &names).PermitUncheckedError();
  const bool former = std::find(names.begin(), names.end(), kFormerCatalog) != names.end();
  if (former) descriptors.emplace_back(kFormerCatalog, FamilyOptions(Family::kCatalog, block_cache_));
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
    // A family that has a table can be told from it if the list of files is ever lost.
    batch.Put(access.family(Family::kCatalog), "!", SealValue("!", "")).PermitUncheckedError();
    for (const Family family : {Family::kRecordInfos, Family::kRecords}) {
      batch.Delete(access.family(family), "!").PermitUncheckedError();
    }
    RWKV_RETURN_IF_ERROR(Write(std::move(access), batch, Durability::kSynced));
    RWKV_ASSIGN_OR_RETURN(access, Read());
    return FromRocksdbStatus(access.db().Flush({}, {access.families_, access.families_ + kFamilyCount}), name_);
  }
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(status, name_));
  if (version != kFormatVersion && version != kFormerFormatVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat(name_, ": format ", version, ", while this build reads format ", kFormatVersion));
  }
  return Upgrade(version);
}

absl::Status Database::Upgrade(const std::string& version) {
  absl::MutexLock lock(&db_mu_);
  if (version == kFormerFormatVersion) {
    int64_t rows = 0;
    if (families_.size() > kFamilyCount) {
      RWKV_ASSIGN_OR_RETURN(
          rows, CopyFormerRows(*db_, families_.back(), families_[static_cast<size_t>(Family::kCatalog)], name_));
    }
    rocksdb::WriteOptions options;
    options.sync = true;
    RWKV_RETURN_IF_ERROR(FromRocksdbStatus(
        db_->Put(options, families_[static_cast<size_t>(Family::kMeta)], kFormatKey, kFormatVersion), name_));
    common::LogInfo("format_upgraded",
                    {{"data_dir", options_.data_dir}, {"from", version}, {"to", kFormatVersion}, {"rows", rows}});
  }
  if (families_.size() <= kFamilyCount) return absl::OkStatus();
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(db_->DropColumnFamily(families_.back()), name_));
  db_->DestroyColumnFamilyHandle(families_.back()).PermitUncheckedError();
  families_.pop_back();
  return absl::OkStatus();
}

absl::Status Database::CheckJournal(const AcknowledgedRows& acknowledged) {
  if (journal_ == nullptr) return absl::OkStatus();
  const absl::optional<uint64_t> written = journal_->ReadWritten();
  if (acknowledged.damaged) common::LogWarning("journal_damaged", {{"data_dir", options_.data_dir}});
  {
    RWKV_ASSIGN_OR_RETURN(const Access access, Read());
    log_is_whole_ = written.has_value() && access.db().GetLatestSequenceNumber() >= *written;
    for (const auto& [key, row] : acknowledged.rows) {
      std::string value;
      const rocksdb::Status status =
          access.db().Get(rocksdb::ReadOptions(), access.family(Family::kCatalog), key, &value);
      if (!status.IsNotFound()) RWKV_RETURN_IF_ERROR(FromRocksdbStatus(status, name_));
      absl::optional<uint32_t> stored;
      if (status.ok()) stored = SealOf(value);
      if (!acknowledged.Agrees(key, stored)) lost_rows_.push_back(key);
    }
  }
  return lost_rows_.empty() ? AcceptLoss() : absl::OkStatus();
}

void Database::TrustLog() {
  if (journal_ == nullptr) return;
  const absl::StatusOr<Access> access = Read();
  if (!access.ok()) return;
  journal_->NoteWritten(access->db().GetLatestSequenceNumber(), /*closed=*/false);
  log_is_trusted_ = true;
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
  uint64_t intent = 0;
  if (journal_ != nullptr && durability == Durability::kSynced) {
    const std::vector<JournalEdit> edits = EditsOf(batch, access.family(Family::kCatalog)->GetID());
    if (!edits.empty()) {
      const absl::StatusOr<uint64_t> intended = journal_->Intend(edits);
      if (!intended.ok()) return Failed(intended.status());
      intent = *intended;
    }
  }
  rocksdb::WriteOptions options;
  options.sync = durability == Durability::kSynced;
  if (options.sync) has_buffered_ = false;
  const absl::Time start = absl::Now();
  const rocksdb::Status status = access.db().Write(options, &batch);
  const uint64_t written = status.ok() ? access.db().GetLatestSequenceNumber() : 0;
  access = Access();
  if (!status.ok()) return Failed(FromRocksdbStatus(status, absl::StrCat(name_, ": write failed")));
  if (intent != 0) journal_->Acknowledge(intent);
  if (!options.sync) has_buffered_ = true;
  if (log_is_trusted_) journal_->NoteWritten(written, /*closed=*/false);
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

absl::Status Database::SyncBuffered() { return has_buffered_ ? Sync() : absl::OkStatus(); }

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

absl::Status Database::Failed(const absl::Status& error) {
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
