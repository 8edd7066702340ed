#include "services/state_store/rows/postgres/postgres_row_store.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status_macros.h"
#include "postgresql/libpq-fe.h"
#include "services/state_store/rows/numbers.h"
#include "services/state_store/rows/sealed_value.h"

namespace rwkv::state_store {
namespace {

constexpr uint32_t kByteaOid = 17;
constexpr int64_t kFirstPage = 32;  // Rows; most scans want few.
constexpr int64_t kLastPage = 2048;

// Version n is made by kMigrations[n - 1]. Append only.
constexpr const char* kMigrations[] = {
    "CREATE TABLE rwkv.rows (key bytea PRIMARY KEY, value bytea NOT NULL) WITH (fillfactor = 80);"
    "CREATE SEQUENCE rwkv.ids MINVALUE 1;",
};

std::vector<PostgresConnection::Prepared> Statements() {
  return {
      {"get", "SELECT value FROM rwkv.rows WHERE key = $1::bytea"},
      {"up", "SELECT key, value FROM rwkv.rows WHERE key >= $1::bytea AND key < $2::bytea ORDER BY key LIMIT $3::int8"},
      {"down",
       "SELECT key, value FROM rwkv.rows WHERE key >= $1::bytea AND key < $2::bytea ORDER BY key DESC LIMIT $3::int8"},
      {"put",
       "INSERT INTO rwkv.rows SELECT * FROM unnest($1::bytea[], $2::bytea[]) "
       "ON CONFLICT (key) DO UPDATE SET value = excluded.value"},
      {"delete", "DELETE FROM rwkv.rows WHERE key = ANY($1::bytea[])"},
      {"delete_range", "DELETE FROM rwkv.rows WHERE key >= $1::bytea AND key < $2::bytea"},
      {"next_id", "SELECT nextval('rwkv.ids')"},
      {"commit", "COMMIT"},
  };
}

std::string Int64(int64_t number) {
  std::string bytes;
  AppendNumber(bytes, static_cast<uint64_t>(number));
  return bytes;
}

void AppendInt32(std::string& bytes, uint32_t number) {
  for (int shift = 24; shift >= 0; shift -= 8) bytes.push_back(static_cast<char>(number >> shift));
}

// The binary form of bytea[].
std::string ByteaArray(const std::vector<absl::string_view>& values) {
  std::string bytes;
  for (const uint32_t number : {1u, 0u, kByteaOid, static_cast<uint32_t>(values.size()), 1u}) {
    AppendInt32(bytes, number);
  }
  for (const absl::string_view value : values) {
    AppendInt32(bytes, static_cast<uint32_t>(value.size()));
    bytes.append(value.data(), value.size());
  }
  return bytes;
}

// FNV-1a; of no meaning but that it is the same everywhere.
int64_t LockNumber(absl::string_view name) {
  uint64_t hash = 14695981039346656037u;
  for (const char c : name) hash = (hash ^ static_cast<uint8_t>(c)) * 1099511628211u;
  return static_cast<int64_t>(hash);
}

std::string LockSql(const std::vector<std::string>& names) {
  std::vector<int64_t> numbers;
  for (const std::string& name : names) numbers.push_back(LockNumber(name));
  std::sort(numbers.begin(), numbers.end());
  numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
  return absl::StrCat("SELECT count(pg_advisory_xact_lock(k)) FROM unnest('{", absl::StrJoin(numbers, ","),
                      "}'::bigint[]) k");
}

absl::StatusOr<std::string> Unseal(absl::string_view key, std::string sealed) {
  const absl::optional<absl::string_view> value = OpenValue(key, sealed);
  if (!value.has_value()) {
    return absl::DataLossError(absl::StrCat("catalog: row ", PrintableKey(key), " is corrupt: its checksum is wrong"));
  }
  sealed.resize(value->size());
  return sealed;
}

}  // namespace

// Also a reader: one that changes nothing.
class PostgresRowStore::Transaction final : public RowTransaction {
 public:
  explicit Transaction(PostgresPool::Lease connection) : connection_(std::move(connection)) {}
  ~Transaction() override {
    // Locks are to be free when this returns, so a mere disconnecting would not do.
    if (!over_ && !connection_->broken() && !connection_->Execute("ROLLBACK").ok()) connection_.set_clean(false);
  }

  absl::Status Start(const std::string& sql) { return connection_->Execute(sql).status(); }

  absl::StatusOr<absl::optional<std::string>> Get(absl::string_view key) override {
    RWKV_ASSIGN_OR_RETURN(PostgresRows rows, connection_->Run({"get", {std::string(key)}}));
    if (rows.empty()) return absl::optional<std::string>();
    RWKV_ASSIGN_OR_RETURN(std::string value, Unseal(key, std::move(rows[0][0])));
    return absl::optional<std::string>(std::move(value));
  }

  absl::Status Scan(absl::string_view begin, absl::string_view end, Visit visit) override {
    return DoScan("up", std::string(begin), std::string(end), visit);
  }
  absl::Status ScanBack(absl::string_view begin, absl::string_view end, Visit visit) override {
    return DoScan("down", std::string(begin), std::string(end), visit);
  }

  absl::Status Extend(const std::vector<std::string>& locks) override {
    return connection_->Execute(LockSql(locks)).status();
  }
  absl::StatusOr<uint64_t> NextId() override {
    RWKV_ASSIGN_OR_RETURN(const PostgresRows rows, connection_->Run({"next_id", {}}));
    return NumberAt(rows[0][0], 0);
  }

  void Put(absl::string_view key, absl::string_view value) override {
    edits_[std::string(key)] = SealValue(key, value);
  }
  void Delete(absl::string_view key) override { edits_[std::string(key)] = absl::nullopt; }
  void DeleteRange(absl::string_view begin, absl::string_view end) override {
    // Ranges go first, so what was put into one before must not come.
    edits_.erase(edits_.lower_bound(std::string(begin)), edits_.lower_bound(std::string(end)));
    ranges_.push_back({"delete_range", {std::string(begin), std::string(end)}});
  }
  bool empty() const override { return edits_.empty() && ranges_.empty(); }

  absl::Status Commit() override {
    std::vector<PostgresStatement> statements = std::move(ranges_);
    std::vector<absl::string_view> puts, values, deletes;
    for (const auto& [key, value] : edits_) {
      (value.has_value() ? puts : deletes).push_back(key);
      if (value.has_value()) values.push_back(*value);
    }
    if (!deletes.empty()) statements.push_back({"delete", {ByteaArray(deletes)}});
    if (!puts.empty()) statements.push_back({"put", {ByteaArray(puts), ByteaArray(values)}});
    const absl::Status status = connection_->RunAndCommit(statements);
    over_ = status.ok();
    return status;
  }

 private:
  absl::Status DoScan(const char* statement, std::string begin, std::string end, Visit visit) {
    const bool ascending = std::string(statement) == "up";
    for (int64_t page = kFirstPage;; page = std::min(page * 8, kLastPage)) {
      RWKV_ASSIGN_OR_RETURN(PostgresRows rows, connection_->Run({statement, {begin, end, Int64(page)}}));
      for (std::vector<std::string>& row : rows) {
        RWKV_ASSIGN_OR_RETURN(const std::string value, Unseal(row[0], std::move(row[1])));
        RWKV_ASSIGN_OR_RETURN(const bool go_on, visit(row[0], value));
        if (!go_on) return absl::OkStatus();
      }
      if (rows.size() < static_cast<size_t>(page)) return absl::OkStatus();
      if (ascending) {
        begin = rows.back()[0] + '\0';
      } else {
        end = rows.back()[0];
      }
    }
  }

  PostgresPool::Lease connection_;
  std::map<std::string, absl::optional<std::string>> edits_;  // Unset: deleted.
  std::vector<PostgresStatement> ranges_;
  bool over_ = false;
};

PostgresRowStore::PostgresRowStore(const PostgresPool::Options& options) : pool_(options, Statements()) {}

absl::StatusOr<std::unique_ptr<PostgresRowStore>> PostgresRowStore::Open(const PostgresPool::Options& options) {
  char* error = nullptr;
  PQconninfoOption* const parsed = PQconninfoParse(options.url.c_str(), &error);
  if (parsed == nullptr) {
    const std::string why = error == nullptr ? "" : error;
    PQfreemem(error);
    return absl::InvalidArgumentError(absl::StrCat("the catalog's address is no PostgreSQL URL: ", why));
  }
  bool has_password = false;
  for (const PQconninfoOption* option = parsed; option->keyword != nullptr; ++option) {
    has_password |= std::string(option->keyword) == "password" && option->val != nullptr;
  }
  PQconninfoFree(parsed);
  if (has_password) {
    return absl::InvalidArgumentError("the catalog's address holds a password: put it in a file of its own");
  }
  RWKV_ASSIGN_OR_RETURN(const std::unique_ptr<PostgresConnection> connection,
                        PostgresConnection::Open(options.url, options.password, options.timeout));
  RWKV_RETURN_IF_ERROR(Migrate(*connection));
  return std::unique_ptr<PostgresRowStore>(new PostgresRowStore(options));
}

absl::Status PostgresRowStore::Migrate(PostgresConnection& connection) {
  // One process at a time; the others find it done. All of it is one transaction.
  RWKV_RETURN_IF_ERROR(connection.Execute(absl::StrCat("BEGIN; ", LockSql({"rwkv migrations"}))).status());
  RWKV_ASSIGN_OR_RETURN(const PostgresRows there,
                        connection.Execute("SELECT count(*) FROM pg_namespace WHERE nspname = 'rwkv'"));
  if (there[0][0] == "0") {
    RWKV_RETURN_IF_ERROR(connection
                             .Execute("CREATE SCHEMA rwkv; CREATE TABLE rwkv.migrations (version int PRIMARY KEY, "
                                      "applied timestamptz NOT NULL DEFAULT now())")
                             .status());
  }
  RWKV_ASSIGN_OR_RETURN(const PostgresRows rows,
                        connection.Execute("SELECT coalesce(max(version), 0) FROM rwkv.migrations"));
  int version = 0;
  if (!absl::SimpleAtoi(rows[0][0], &version)) return absl::DataLossError("PostgreSQL: rwkv.migrations is no number");
  const int newest = static_cast<int>(std::size(kMigrations));
  if (version > newest) {
    return absl::FailedPreconditionError(absl::StrCat("PostgreSQL: the schema rwkv has version ", version,
                                                      ", while this build knows versions up to ", newest));
  }
  for (; version < newest; ++version) {
    RWKV_RETURN_IF_ERROR(connection
                             .Execute(absl::StrCat(kMigrations[version],
                                                   "INSERT INTO rwkv.migrations (version) VALUES (", version + 1, ")"))
                             .status());
  }
  return connection.Execute("COMMIT").status();
}

absl::StatusOr<std::unique_ptr<RowTransaction>> PostgresRowStore::Begin(const std::vector<std::string>& locks) {
  RWKV_ASSIGN_OR_RETURN(PostgresPool::Lease connection, pool_.Take());
  auto transaction = std::make_unique<Transaction>(std::move(connection));
  RWKV_RETURN_IF_ERROR(transaction->Start(absl::StrCat("BEGIN; ", locks.empty() ? "" : LockSql(locks))));
  return transaction;
}

absl::StatusOr<std::unique_ptr<RowReader>> PostgresRowStore::Read() {
  RWKV_ASSIGN_OR_RETURN(PostgresPool::Lease connection, pool_.Take());
  auto transaction = std::make_unique<Transaction>(std::move(connection));
  RWKV_RETURN_IF_ERROR(transaction->Start("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"));
  return transaction;
}

absl::Status PostgresRowStore::RaiseNextId(uint64_t at_least) {
  RWKV_ASSIGN_OR_RETURN(PostgresPool::Lease connection, pool_.Take());
  return connection
      ->Execute(absl::StrCat("SELECT setval('rwkv.ids', greatest(", at_least, ", (SELECT last_value FROM rwkv.ids)))"))
      .status();
}

}  // namespace rwkv::state_store
