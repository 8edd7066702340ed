#include "services/state_store/rows/rocksdb/rocksdb_row_store.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "rocksdb/db.h"
#include "rocksdb/iterator.h"
#include "rocksdb/snapshot.h"
#include "rocksdb/write_batch.h"
#include "services/state_store/rocksdb/rocksdb_status.h"
#include "services/state_store/rows/numbers.h"
#include "services/state_store/rows/sealed_value.h"

namespace rwkv::state_store {
namespace {

constexpr uint64_t kIdsReserved = 1024;  // One fsync for so many ids; lost by a restart, which is fine.

rocksdb::Slice ToSlice(absl::string_view bytes) { return rocksdb::Slice(bytes.data(), bytes.size()); }
absl::string_view ToView(const rocksdb::Slice& slice) { return absl::string_view(slice.data(), slice.size()); }

absl::StatusOr<absl::string_view> Open(absl::string_view key, absl::string_view sealed) {
  const absl::optional<absl::string_view> value = OpenValue(key, sealed);
  if (value.has_value()) return *value;
  return absl::DataLossError(absl::StrCat("catalog: row ", PrintableKey(key), " is corrupt: its checksum is wrong"));
}

// Reading under an access: at its moment of making, or always the newest.
class AccessRows {
 public:
  AccessRows(Database::Access access, bool once) : access_(std::move(access)) {
    if (once) snapshot_ = std::make_unique<rocksdb::ManagedSnapshot>(&access_.db());
  }

  absl::StatusOr<absl::optional<std::string>> Get(absl::string_view key) const {
    std::string sealed;
    const rocksdb::Status status = access_.db().Get(Options(), family(), ToSlice(key), &sealed);
    if (status.IsNotFound()) return absl::optional<std::string>();
    RWKV_RETURN_IF_ERROR(FromRocksdbStatus(status, "catalog: read failed"));
    RWKV_ASSIGN_OR_RETURN(const absl::string_view value, Open(key, sealed));
    sealed.resize(value.size());
    return absl::optional<std::string>(std::move(sealed));
  }

  absl::Status Scan(absl::string_view begin, absl::string_view end, bool ascending, RowReader::Visit visit) const {
    rocksdb::ReadOptions options = Options();
    const rocksdb::Slice lower = ToSlice(begin), upper = ToSlice(end);
    options.iterate_lower_bound = &lower;
    options.iterate_upper_bound = &upper;
    const std::unique_ptr<rocksdb::Iterator> it(access_.db().NewIterator(options, family()));
    for (ascending ? it->SeekToFirst() : it->SeekToLast(); it->Valid(); ascending ? it->Next() : it->Prev()) {
      RWKV_ASSIGN_OR_RETURN(const absl::string_view value, Open(ToView(it->key()), ToView(it->value())));
      RWKV_ASSIGN_OR_RETURN(const bool go_on, visit(ToView(it->key()), value));
      if (!go_on) return absl::OkStatus();
    }
    return FromRocksdbStatus(it->status(), "catalog: read failed");
  }

  rocksdb::ColumnFamilyHandle* family() const { return access_.family(Family::kCatalog); }
  uint64_t opening() const { return access_.opening(); }
  Database::Access Close() && {
    snapshot_.reset();
    return std::move(access_);
  }

 private:
  rocksdb::ReadOptions Options() const {
    rocksdb::ReadOptions options;
    if (snapshot_ != nullptr) options.snapshot = snapshot_->snapshot();
    return options;
  }

  Database::Access access_;
  std::unique_ptr<rocksdb::ManagedSnapshot> snapshot_;  // Goes before access_.
};

}  // namespace

class RocksdbRowStore::Reader final : public RowReader {
 public:
  explicit Reader(Database::Access access) : rows_(std::move(access), /*once=*/true) {}
  absl::StatusOr<absl::optional<std::string>> Get(absl::string_view key) override { return rows_.Get(key); }
  absl::Status Scan(absl::string_view begin, absl::string_view end, Visit visit) override {
    return rows_.Scan(begin, end, true, visit);
  }
  absl::Status ScanBack(absl::string_view begin, absl::string_view end, Visit visit) override {
    return rows_.Scan(begin, end, false, visit);
  }

 private:
  const AccessRows rows_;
};

// Holds the right to use the database but while it waits for something. If the database was opened again meanwhile,
// what was read is not to be relied on, and the transaction fails.
class RocksdbRowStore::Transaction final : public RowTransaction {
 public:
  Transaction(RocksdbRowStore* store, KeyLocks::Guard guard, Database::Access access) : store_(store) {
    guards_.push_back(std::move(guard));
    rows_.emplace(std::move(access), /*once=*/false);
    opening_ = rows_->opening();
  }

  absl::StatusOr<absl::optional<std::string>> Get(absl::string_view key) override {
    if (!rows_.has_value()) return lost_;
    return rows_->Get(key);
  }
  absl::Status Scan(absl::string_view begin, absl::string_view end, Visit visit) override {
    return rows_.has_value() ? rows_->Scan(begin, end, true, visit) : lost_;
  }
  absl::Status ScanBack(absl::string_view begin, absl::string_view end, Visit visit) override {
    return rows_.has_value() ? rows_->Scan(begin, end, false, visit) : lost_;
  }
  absl::Status Extend(const std::vector<std::string>& locks) override {
    rows_.reset();
    RWKV_ASSIGN_OR_RETURN(KeyLocks::Guard guard, store_->locks_.Lock(locks));
    guards_.push_back(std::move(guard));
    return Resume();
  }
  absl::StatusOr<uint64_t> NextId() override {
    rows_.reset();
    RWKV_ASSIGN_OR_RETURN(const uint64_t id, store_->NextId());
    RWKV_RETURN_IF_ERROR(Resume());
    return id;
  }
  // The family's handle may change with an opening, so the batch is made only when it is written.
  void Put(absl::string_view key, absl::string_view value) override {
    edits_.push_back({Kind::kPut, std::string(key), SealValue(key, value)});
  }
  void Delete(absl::string_view key) override { edits_.push_back({Kind::kDelete, std::string(key), ""}); }
  void DeleteRange(absl::string_view begin, absl::string_view end) override {
    edits_.push_back({Kind::kDeleteRange, std::string(begin), std::string(end)});
  }
  bool empty() const override { return edits_.empty(); }
  absl::Status Commit() override {
    if (!rows_.has_value()) return lost_;
    if (edits_.empty()) return absl::OkStatus();
    rocksdb::WriteBatch batch;
    for (const Edit& edit : edits_) {
      rocksdb::Status status;
      switch (edit.kind) {
        case Kind::kPut:
          status = batch.Put(rows_->family(), edit.key, edit.value);
          break;
        case Kind::kDelete:
          status = batch.Delete(rows_->family(), edit.key);
          break;
        case Kind::kDeleteRange:
          status = batch.DeleteRange(rows_->family(), edit.key, edit.value);
          break;
      }
      RWKV_RETURN_IF_ERROR(FromRocksdbStatus(status, "catalog: write failed"));
    }
    Database::Access access = (*std::move(rows_)).Close();
    rows_.reset();
    return store_->database_->Write(std::move(access), batch, Durability::kSynced);
  }

 private:
  enum class Kind { kPut, kDelete, kDeleteRange };
  struct Edit {
    Kind kind;
    std::string key;    // Of a range its begin.
    std::string value;  // Of a range its end.
  };

  absl::Status Resume() {
    absl::StatusOr<Database::Access> access = store_->database_->Read();
    if (!access.ok()) return lost_ = access.status();
    if (access->opening() != opening_) {
      return lost_ = absl::UnavailableError(
                 absl::StrCat(store_->database_->name(), ": opened again meanwhile; nothing was changed"));
    }
    rows_.emplace(*std::move(access), /*once=*/false);
    return absl::OkStatus();
  }

  RocksdbRowStore* const store_;
  std::vector<KeyLocks::Guard> guards_;
  uint64_t opening_ = 0;
  absl::optional<AccessRows> rows_;
  std::vector<Edit> edits_;
  absl::Status lost_ = absl::UnavailableError("catalog: the transaction is over");  // Why there are no rows_.
};

absl::StatusOr<std::unique_ptr<RowTransaction>> RocksdbRowStore::Begin(const std::vector<std::string>& locks) {
  RWKV_ASSIGN_OR_RETURN(KeyLocks::Guard guard, locks_.Lock(locks));
  RWKV_ASSIGN_OR_RETURN(Database::Access access, database_->Read());
  return std::unique_ptr<RowTransaction>(new Transaction(this, std::move(guard), std::move(access)));
}

absl::StatusOr<std::unique_ptr<RowReader>> RocksdbRowStore::Read() {
  RWKV_ASSIGN_OR_RETURN(Database::Access access, database_->Read());
  return std::unique_ptr<RowReader>(new Reader(std::move(access)));
}

absl::StatusOr<uint64_t> RocksdbRowStore::NextId() {
  absl::MutexLock lock(&id_mu_);
  if (next_id_ == reserved_ids_end_) RWKV_RETURN_IF_ERROR(ReserveIds());
  return next_id_++;
}

absl::Status RocksdbRowStore::ReserveIds() {
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<RowTransaction> rows, Begin({kNextIdKey}));
  if (next_id_ == 0) {
    RWKV_ASSIGN_OR_RETURN(const absl::optional<std::string> next, rows->Get(kNextIdKey));
    if (next.has_value() && next->size() != 8) {
      return absl::DataLossError("catalog: the row of the next id is corrupt");
    }
    next_id_ = reserved_ids_end_ = next.has_value() ? NumberAt(*next, 0) : 1;
  }
  std::string value;
  AppendNumber(value, next_id_ + kIdsReserved);
  rows->Put(kNextIdKey, value);
  RWKV_RETURN_IF_ERROR(rows->Commit());
  reserved_ids_end_ = next_id_ + kIdsReserved;
  return absl::OkStatus();
}

}  // namespace rwkv::state_store
